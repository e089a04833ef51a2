"""Atomic writing of files, and digests of tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, sha1
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

UNFINISHED = ".unfinished-"  # begins the names of files and folders that are being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file to write, and put it in the place of ``path`` when the block ends.

    If the block raises, or the process is killed, ``path`` has its old content.
    """
    temporary = path.parent / f"{UNFINISHED}{uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the umask of the process asks for
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the directory entry must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: if the process is killed, the file has either the old or the new content."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files of processes that were killed inside :func:`replacing`."""
    for path in folder.glob(UNFINISHED + "*"):
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
    return _hashed(blake2b(digest_size=16), values)


def fingerprint(values: Any) -> str:
    """As :func:`digest`, by SHA-1, the fastest on most processors: for what is kept in this process alone."""
    return _hashed(sha1(usedforsecurity=False), values)


def _hashed(total: Any, values: Any) -> str:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            total.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str):
            total.update(leaf.encode())
    return str(total.hexdigest())
