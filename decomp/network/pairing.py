"""Pairs of factorized layers, or blocks of layers, and their counterparts in the dense network."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from decomp._util.naming import matches, some
from decomp.layers import Factorized, Unpacked
from decomp.layers.kernels import shape_of
from decomp.network.selection import Selector, select


def factorized_names(small: nn.Module) -> set[str]:
    """The names of the factorized layers of a model."""
    return {name for name, module in small.named_modules() if isinstance(module, Factorized)}


def pairs_of(
    small: nn.Module, dense: nn.Module, layers: Selector = None
) -> dict[str, tuple[Factorized, nn.Module]]:
    """The factorized layers of ``small`` with the layers of ``dense`` that they replace, by name.

    ``layers`` selects some of them, by globs on names, types (of the dense layer or of the factorized one) or
    predicates of the name and the dense layer.

    Raises:
        ValueError: ``small`` has none, a glob or a type matches none, or ``dense`` is another model.
        TypeError: ``layers`` is none of these.
    """
    factorized = {name: module for name, module in small.named_modules() if isinstance(module, Factorized)}
    known = dict(dense.named_modules())
    if not factorized:
        swapped = any(isinstance(module, Factorized) for module in known.values())
        hint = "the order of arguments is (small, dense, data)" if swapped else "compress the model first"
        raise ValueError(f"small has no factorized layer: {hint}")
    for name, layer in factorized.items():
        twin = known.get(name)
        shape = None if twin is None else shape_of(twin)
        if twin is None or isinstance(twin, Factorized) or shape != layer.dense_shape:
            given = "nothing" if twin is None else type(twin).__name__ + f" with weight {shape}"
            raise ValueError(
                f"layer {name!r}: dense has {given} where small has {type(layer).__name__} of weight "
                f"{layer.dense_shape}: give the model that small was made from"
            )
    pairs = {name: (layer, known[name]) for name, layer in factorized.items()}
    packings = {name: module for name, module in small.named_modules() if isinstance(module, Unpacked)}
    parts = ["*"] if layers is None else layers if isinstance(layers, tuple | list | set | frozenset) else [layers]
    selected: set[str] = set()
    for part in parts:
        if isinstance(part, type):
            names = {name for name, pair in pairs.items() if part in map(type, pair)}
        else:
            twins = {name: twin for name, (_, twin) in pairs.items()}
            names = select(part, twins, "layers", "factorized layer", unpacked=packings)
        if not names:
            raise ValueError(f"layers={part!r} matches no factorized layer; there are {some(list(factorized))}")
        selected |= names
    return {name: pair for name, pair in pairs.items() if name in selected}


def blocks_of(
    small: nn.Module,
    dense: nn.Module,
    layers: Mapping[str, tuple[nn.Module, nn.Module]],
    blocks: str | Sequence[str] | None,
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The layers, with those inside a block replaced by the block, a module whose name matches one of ``blocks``.

    Of nested matching modules the outermost is the block. "auto" is :func:`repeated_blocks`.

    Raises:
        ValueError: a glob matches no module, or no factorized layer lies in what it matches.
    """
    if blocks == "auto":
        blocks = repeated_blocks(small, list(layers))
    globs = [blocks] if isinstance(blocks, str) else list(blocks or ())
    by_block: dict[str, tuple[nn.Module, nn.Module]] = {}
    for glob in globs:
        matching = [name for name, _ in small.named_modules() if name and matches(name, glob)]
        outermost = [name for name in matching if not any(name.startswith(f"{other}.") for other in matching)]
        holding = [name for name in outermost if any(_inside(layer, name) for layer in layers)]
        if not holding:
            what = "holds a factorized layer" if matching else "has such a name"
            known = some([name for name, _ in small.named_children()])
            raise ValueError(f"blocks={glob!r}: no module {what}; modules are {known}, and their submodules")
        by_block |= {name: (small.get_submodule(name), dense.get_submodule(name)) for name in holding}
    nested = [name for name in by_block if any(name.startswith(f"{other}.") for other in by_block)]
    if nested:
        raise ValueError(f"blocks={blocks!r}: block {nested[0]!r} lies in another block: leave one of them out")
    single = {name: pair for name, pair in layers.items() if not any(_inside(name, block) for block in by_block)}
    return by_block | single


def repeated_blocks(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The outermost modules of a class that occurs several times in the model, and that hold two of the layers.

    These are the residual blocks of a ResNet, the layers of a transformer, the stages of a U-Net. A module that
    holds a list of such blocks and at most one other layer is none: the encoder and the decoder of a transformer.
    Classes of ``torch.nn`` itself are left out, but for the layers of its transformers.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> class Tower(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList([Block(), Block()])
    >>> model = nn.Sequential(Tower(), nn.Linear(2, 2), Tower())
    >>> repeated_blocks(model, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    ['0.layers.0', '0.layers.1', '2.layers.0', '2.layers.1']
    """
    held: dict[str, set[str]] = {}
    for layer in layers:
        parts = layer.split(".")
        for end in range(1, len(parts) + 1):
            held.setdefault(".".join(parts[:end]), set()).add(layer)
    known = {name: module for name, module in model.named_modules() if name and _may_be_block(module)}
    counts = Counter(type(module) for module in known.values())
    holding = {name: module for name, module in known.items() if len(held.get(name, ())) > 1}
    members = _equal_members(model, holding)
    found: set[str] = set()
    for name, module in holding.items():  # a module comes before those inside of it
        parts = name.split(".")
        inside_another = any(".".join(parts[:end]) in found for end in range(1, len(parts)))
        if counts[type(module)] == 1 or inside_another:
            continue
        within = [held[each] for each in members if each.startswith(f"{name}.")]
        if not within or len(held[name].difference(*within)) > 1:
            found.add(name)
    return [name for name in holding if name in found]


def _equal_members(model: nn.Module, holding: Mapping[str, nn.Module]) -> set[str]:
    """Those of these modules that lie in a list, or a sequence, with another one of their class."""
    found: set[str] = set()
    for place, holder in model.named_modules():
        if not isinstance(holder, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        members = [f"{place}.{name}" if place else name for name, _ in holder.named_children()]
        counts = Counter(type(holding[each]) for each in members if each in holding)
        found.update(each for each in members if each in holding and counts[type(holding[each])] > 1)
    return found


def _may_be_block(module: nn.Module) -> bool:
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    is_plain = type(module).__module__.startswith("torch.nn.") and not isinstance(module, layers)
    return not is_plain and not isinstance(module, Factorized)


def _inside(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")
