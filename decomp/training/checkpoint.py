"""Checkpoints in a folder: each file is written whole, has a checksum, and holds no code."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from decomp._util.io import digest, remove_unfinished, write_atomically
from decomp._util.schema import Value

FORMAT = 4


class Checkpoint:
    """The state of a run, as named files in a folder.

    ``identity`` are the models and settings of the run; a folder of another run is refused. States are nested
    dicts, lists, tuples, numbers, strings and tensors. Only the process with ``writes`` writes.

    Raises:
        ValueError: the folder is that of another run (the message names what differs), or ``run.json`` is damaged.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], *, writes: bool = True) -> None:
        self._folder, self._writes = Path(folder), writes
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        path = self._folder / "run.json"
        if path.exists():
            saved = _read_identity(path)
            _compare(self._folder, saved, identity)
            identity = saved  # 1 and 1.0 are the same run, with another text
        self._run = json.dumps(identity, sort_keys=True)
        if writes:
            remove_unfinished(self._folder)
            if not path.exists():
                write_atomically(path, json.dumps(identity, indent=1).encode())

    def load(self, name: str) -> Any:
        """The state of that name, or None where there is none.

        Raises:
            ValueError: the file is damaged, or of another run or name.
        """
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            return None
        content = path.read_bytes()
        try:
            return unpack(content, f"{self._run} {name}")
        except Exception as error:  # safetensors and json raise what they like on bytes that are not theirs
            raise _damaged(path, error) from error

    def require_sound(self, names: Iterable[str]) -> None:
        """Refuse damaged files before anything is changed by one of the others."""
        for name in names:
            self.load(name)

    def save(self, name: str, state: Any) -> None:
        """Save a state under a name; the file of before stays until the new one is whole."""
        if self._writes:
            write_atomically(self._folder / f"{name}.safetensors", pack(state, f"{self._run} {name}"))


def _read_identity(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        return {name: value.value for name, value in Value.parse(content).entries().items()}
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"checkpoint: the file {str(path)!r} is damaged, or belongs to another run ({error}): bring it back from "
        "a backup, or remove the folder to start from the beginning"
    )


def pack(state: Any, owner: str = "") -> bytes:
    """The bytes of a safetensors file that holds a nested state: the tensors, and the rest as JSON in its header.

    The header also holds a checksum of the state and of ``owner``, the run and name that the file belongs to.

    >>> import torch
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
    return save(tensors, {"state": header, "checksum": _checksum(tensors, header, owner)})


def _checksum(tensors: Mapping[str, Tensor], header: str, owner: str) -> str:
    described = [(json.dumps([name, str(t.dtype), list(t.shape)]), t) for name, t in sorted(tensors.items())]
    return digest([json.dumps([owner, header]), described])


def unpack(content: bytes, owner: str = "") -> Any:
    """The state that :func:`pack` packed.

    Raises:
        ValueError: the checksum is not that of the content and the owner.
        Exception: what safetensors and json raise on other bytes.
    """
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    header, tensors = metadata["state"], load(content)
    if metadata["checksum"] != _checksum(tensors, header, owner):
        raise ValueError("its checksum is that of another content")

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
    """Digests of the layers and of the weights of models, by the names of the arguments."""
    return {f"{key} of {name}": value for name, model in models.items() for key, value in _digests(model).items()}


def _digests(model: nn.Module | None) -> dict[str, str]:
    tensors = {} if model is None else dict([*model.named_parameters(), *model.named_buffers()])
    shapes = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(tensors.items())}
    return {"layers": digest(json.dumps(shapes)), "weights": digest([tensors[name] for name in shapes])}


def name_of(function: Callable[..., Any] | None) -> str | None:
    """The name of a function, with the arguments that ``functools.partial`` has bound."""
    inner = getattr(function, "func", None)
    if inner is not None:
        bound: Any = function
        return f"{name_of(inner)}{bound.args}{sorted(bound.keywords.items())}"
    return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))


def _compare(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if differing:
        which = "; ".join(f"{key}: {saved.get(key)} there, {now.get(key)} now" for key in differing)
        raise ValueError(
            f"checkpoint={str(folder)!r} belongs to another run, by its run.json ({which}): "
            "call with the same models and arguments as then, or name another folder"
        )
