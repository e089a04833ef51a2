"""Damage done at random to JSON, to text and to bytes."""

import copy
import json

STRANGE = [
    *(None, True, False, 0, -1, 3.9, 1e300, 10**400, float("nan"), float("inf"), "", "33", "x", "\x00"),
    *([], {}, [3.9, 3.9], ["3"], [[]], [10**400], {"x": 1}, [float("inf"), -1]),
]


def places(tree):
    """Every container in a document, with a key or an index into it."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from places(tree[key])


def in_the_tree(document, draw):
    """A document with up to three random edits of its tree, as text."""
    tree = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            break
        box, key = draw.choice(found)
        kind = draw.randrange(7)
        if kind == 0:
            del box[key]
        elif kind == 1:
            other, name = draw.choice(found)
            box[key] = copy.deepcopy(other[name])
        elif kind == 2:
            box[key] = draw.choice(([box[key]], {"inner": box[key]}, str(box[key])))
        elif kind == 3 and isinstance(box[key], int | float) and abs(box[key]) < 2**60:
            box[key] = draw.choice((-box[key], box[key] + 0.5, box[key] * 2**70, str(box[key]), box[key] != 0))
        elif kind == 4 and isinstance(box, dict):
            box[draw.choice((f"{key}_", key.upper(), ""))] = box[key]
        elif kind == 4:
            box.insert(key, box[key])
        else:
            box[key] = copy.deepcopy(draw.choice(STRANGE))
    return json.dumps(tree)


def in_the_text(text, draw):
    """A text with a few characters changed, moved, doubled or cut off."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        begin = draw.randrange(len(text) + 1)
        end = min(len(text), begin + draw.choice((1, 1, 2, 20)))
        kind = draw.randrange(5)
        if kind == 0:
            text = text[:begin] + text[end:]
        elif kind == 1:
            text = text[:begin] + draw.choice(('"', "[", "}", ",", "-", "9", "e9", "\\", "é", "null")) + text[end:]
        elif kind == 2:
            text = text[:end] + text[begin:]
        elif kind == 3:
            text = text[:begin] + chr(draw.randrange(1, 256)) + text[begin:]
        elif draw.random() < 0.2:
            text = text[:begin]
    return text


def in_the_bytes(content, draw):
    """Bytes with bits flipped, a stretch cut out, overwritten or doubled, or the end cut off."""
    begin = draw.randrange(len(content))
    end = min(len(content), begin + draw.choice((1, 2, 8, 100)))
    kind = draw.randrange(6)
    if kind == 0:
        return content[:begin]
    if kind == 1:
        return content[:begin] + content[end:]
    if kind == 2:
        return content[:end] + content[begin:]
    if kind == 3:
        return content[:begin] + draw.randbytes(end - begin) + content[end:]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)
