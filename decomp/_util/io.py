"""Files that are never half written, and digests of tensors."""

import os
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_UNFINISHED = ".unfinished-"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old or the new content, whenever the process is killed."""
    handle, temporary = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    if os.name == "posix":  # the new name has to reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a process killed inside :func:`write_atomically` has left in a folder."""
    for path in folder.glob(_UNFINISHED + "*"):
        path.unlink()


def digest(values: Any) -> str:
    """BLAKE2b digest, 16 bytes in hex, of the tensors and strings in nested containers; other leaves are ignored.

    Of a tensor only the raw bytes count: where dtype or shape matter, put them into a string beside it.

    >>> weight = torch.arange(4.0)
    >>> digest(weight) == digest([weight[:2], weight[2:]]) == digest({"w": weight.view(torch.int32)})
    True
    >>> digest(weight) == digest(weight + 1)
    False
    """
    total = blake2b(digest_size=16)
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            total.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str):
            total.update(leaf.encode())
    return total.hexdigest()
