"""Checkpoints of several safetensors files, read tensor by tensor and written without holding a file in memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decomp._util.io import replacing

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Entry:
    """A tensor in a file of safetensors.

    Args:
        path: of the file.
        dtype: as the file names it.
        shape: of the tensor.
        begin: of its bytes, from the beginning of the file.
        end: of its bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Number of bytes."""
        return self.end - self.begin

    def tensor(self) -> Tensor:
        """Read the tensor into memory of its own.

        Raises:
            ValueError: it is of a dtype that torch does not have, or the file is too short.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"{str(self.path)!r} holds a tensor of dtype {self.dtype}, which is not read")
        content = bytearray(self.size_bytes)
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            if file.readinto(content) != len(content):
                raise ValueError(f"{str(self.path)!r} is damaged: it ends within a tensor")
        if not content:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).view(self.shape)

    def copy_to(self, target: BinaryIO) -> None:
        """Copy the bytes to another file, a chunk at a time.

        Raises:
            ValueError: the file is too short.
        """
        left = self.size_bytes
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise ValueError(f"{str(self.path)!r} is damaged: it ends within a tensor")
                target.write(chunk)
                left -= len(chunk)


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name; none is read.

    Raises:
        ValueError: it is no file of safetensors, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # checks that the header is sound and fits the size of the file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged, or no file of safetensors ({error})") from None
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Entry(path, each["dtype"], tuple(each["shape"]), *(8 + size + at for at in each["data_offsets"]))
        for name, each in header.items()
    }


def checkpoint_entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint of one or several files.

    Raises:
        ValueError: there is no file of safetensors, a file or a tensor of the index is missing, or a tensor is
            there twice.
    """
    index = folder / INDEX
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: entries_of(folder / file) for file in sorted(set(names.values()))}
        missing = next((name for name, file in names.items() if name not in files[file]), None)
        if missing is not None:
            raise ValueError(f"{str(folder)!r}: {names[missing]} lacks {missing!r}, which {INDEX} says is there")
        return {name: files[file][name] for name, file in names.items()}
    paths = [folder / WHOLE] if (folder / WHOLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no weights in files of safetensors")
    found: dict[str, Entry] = {}
    for path in paths:
        for name, entry in entries_of(path).items():
            if name in found:
                raise ValueError(f"{str(folder)!r}: {name!r} is in {found[name].path.name} and in {path.name}")
            found[name] = entry
    return found


def write_file(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write a file of safetensors from tensors of other files; at no time it is in memory, or in place half."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, entry in entries.items():
        offsets = [at, at + entry.size_bytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            entry.copy_to(file)
        file.flush()


def write_checkpoint(
    folder: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], max_bytes: int
) -> None:
    """Write a checkpoint, in several files with an index if it is larger than ``max_bytes``.

    Files that are there already are kept: they are whole, since each is put in place by a rename.
    """
    shards = list(_grouped(entries.items(), max_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WHOLE]
    for name, shard in zip(names, shards, strict=True):
        if not (folder / name).exists():
            write_file(folder / name, shard, metadata)
    if len(shards) > 1:
        total = sum(entry.size_bytes for entry in entries.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        with replacing(folder / INDEX) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _grouped(items: Iterable[tuple[str, Entry]], max_bytes: int) -> Iterator[dict[str, Entry]]:
    """Groups of at most ``max_bytes``, or of one tensor that is larger."""
    group: dict[str, Entry] = {}
    size = 0
    for name, entry in items:
        if group and size + entry.size_bytes > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = entry
        size += entry.size_bytes
    if group:
        yield group
