"""Atomic writing of files, and digests of tensors."""

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
    """Write a file atomically: if the process is killed, the file has either the old or the new content."""
    handle, temporary = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    if os.name == "posix":  # the directory entry must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files of processes that were killed inside :func:`write_atomically`."""
    for path in folder.glob(_UNFINISHED + "*"):
        path.unlink()


def digest(values: Any) -> str:
    """BLAKE2b digest, 16 bytes in hex, of the tensors and strings in nested containers; other leaves are ignored.

    Only the raw bytes of a tensor are hashed: to include dtype or shape, add a string with them.

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
