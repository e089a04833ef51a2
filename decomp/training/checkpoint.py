"""Checkpoints in a folder: each file is whole or not there, and nothing in it is code."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

FORMAT = 1
_TEMPORARY = ".unfinished-"


class Checkpoint:
    """What a run has reached, as named states in a folder; without a folder nothing is kept.

    ``identity`` says what the run is; a folder of another run is refused. States are nested dicts, lists, tuples,
    numbers, strings and tensors. Only the process that ``writes`` writes.

    Raises:
        ValueError: the folder is that of another run; the message names what differs.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any], *, writes: bool = True) -> None:
        self._folder = None if folder is None else Path(folder)
        self._writes = writes
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        path = self._folder / "run.json"
        if path.exists():
            _compare(self._folder, json.loads(path.read_text(encoding="utf-8")), identity)
        if writes:
            for left in self._folder.glob(_TEMPORARY + "*"):
                left.unlink()
            if not path.exists():
                write_atomically(path, json.dumps(identity, indent=1).encode())

    @property
    def kept(self) -> bool:
        """Whether there is a folder at all."""
        return self._folder is not None

    def load(self, name: str) -> Any:
        """The state of that name, or None where there is none."""
        path = None if self._folder is None else self._folder / f"{name}.safetensors"
        return unpack(path.read_bytes()) if path is not None and path.exists() else None

    def save(self, name: str, state: Any) -> None:
        """Keep a state under a name; what was there before stays until the new one is whole."""
        if self._folder is not None and self._writes:
            write_atomically(self._folder / f"{name}.safetensors", pack(state))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is the old one or the new one whenever the process is killed."""
    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
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


def pack(state: Any) -> bytes:
    """A nested state as a safetensors file: the tensors, and the rest as JSON in its header.

    >>> unpack(pack({"betas": (0.9, 0.999), "step": {0: torch.tensor(3.0)}}))
    {'betas': (0.9, 0.999), 'step': {0: tensor(3.)}}

    Raises:
        TypeError: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, place: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            key = f"{len(tensors)} {place}"
            tensors[key] = value.detach().cpu().contiguous().clone()
            return {"tensor": key}
        if isinstance(value, dict):
            return {"dict": [[plain(key, place), plain(v, f"{place}.{key}")] for key, v in value.items()]}
        if isinstance(value, tuple | list):
            return {type(value).__name__: [plain(v, f"{place}.{i}") for i, v in enumerate(value)]}
        raise TypeError(
            f"{place} is a {type(value).__name__}, which a checkpoint cannot hold: only numbers, strings, "
            "tensors, lists, tuples and dicts; use another optimizer or schedule, or leave checkpoint= out"
        )

    header = json.dumps(plain(state, "state"))
    return save(tensors, {"state": header})


def unpack(content: bytes) -> Any:
    """The state that :func:`pack` packed."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])["__metadata__"]["state"]
    tensors = load(content)

    def nested(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return tensors[inner]
        if kind == "dict":
            return {nested(key): nested(v) for key, v in inner}
        values = [nested(v) for v in inner]
        return tuple(values) if kind == "tuple" else values

    return nested(json.loads(header))


def identify(**models: nn.Module | None) -> dict[str, str]:
    """What tells models from others, by the names of the arguments: digests of their layers and their weights."""
    return {f"{key} of {name}": value for name, model in models.items() for key, value in _digests(model).items()}


def _digests(model: nn.Module | None) -> dict[str, str]:
    tensors = {} if model is None else dict([*model.named_parameters(), *model.named_buffers()])
    shapes = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(tensors.items())}
    values = hashlib.blake2b(digest_size=16)
    for name in shapes:
        values.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    layers = hashlib.blake2b(json.dumps(shapes).encode(), digest_size=16)
    return {"layers": layers.hexdigest(), "weights": values.hexdigest()}


def name_of(function: Callable[..., Any] | None) -> str | None:
    """A function as an identity can hold it: its name, and what ``functools.partial`` has bound."""
    inner = getattr(function, "func", None)
    if inner is not None:
        bound: Any = function
        return f"{name_of(inner)}{bound.args}{sorted(bound.keywords.items())}"
    return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))


def _compare(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if differing:
        which = "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} now" for key in differing)
        raise ValueError(
            f"checkpoint={str(folder)!r} belongs to another run ({which}): "
            "call with the same models and arguments as then, or name another folder"
        )
