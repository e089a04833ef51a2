"""``decomp.load``: a compressed model from a file."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from decomp.files.constructors import Constructor, construct
from decomp.files.contents import Place, places
from decomp.files.header import Header, checksum
from decomp.methods import Method
from decomp.network import surgery
from decomp.planning.plan import CompressedModule


@surgery.outside_inference_mode()
def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    allow: Iterable[Constructor | str] = (),
    device: torch.device | str | None = None,
    methods: Iterable[Method] = (),
) -> CompressedModule:
    """Read a compressed model from a file that :func:`save` wrote.

    Returns a new model: ``model`` with the factorized layers of the file's plan, and the file's values in every
    parameter and buffer, in the dtypes of the file. Nothing in a file can run code. The weights are read through
    memory mapping, one tensor at a time.

    Args:
        path: of the file.
        model: a model of the dense class that was compressed, with any weights; not changed. On the meta device
            (``with torch.device("meta"): model = Net()``) it costs no memory. Left out, the file must name its
            constructor.
        allow: the constructors that the file may name: names ("mypackage.models.Net"), or the classes and
            functions themselves. Only these are imported and called.
        device: of the result; by default that of each tensor of ``model``, and the CPU in place of meta.
        methods: methods of your own by which layers were decomposed; a file holds only their names.

    Raises:
        ValueError: the file is damaged, of another program or of a newer version, or was not made of such a model,
            or it names a constructor that is not allowed. The message names the file and the layer or entry.
        TypeError: the model is compiled, scripted or wrapped.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with _naming_file(path), _opened(path, methods) as file:
        if model is None:
            model = construct(file.header.constructor, file.header.arguments, allow)
        built = file.header.plan.build(model)
        _fill(built, file, None if device is None else torch.device(device))
    return built


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


@dataclass(frozen=True)
class ModelFile:
    """A file that is open, and its header."""

    header: Header
    shapes: dict[str, tuple[int, ...]]
    _file: Any

    def tensor(self, name: str) -> Tensor:
        """An entry, with the checksum that the header states.

        Raises:
            ValueError: it has another one.
        """
        tensor: Tensor = self._file.get_tensor(name)
        if checksum(name, tensor) != self.header.checksums[name]:
            raise ValueError(f"damaged: the checksum of the entry {name!r} is that of another content")
        return tensor

    def entry_of(self, name: str) -> str | None:
        """The entry that holds a tensor of the model; None if there is none."""
        name = self.header.shared.get(name, name)
        return name if name in self.shapes else None


@contextmanager
def _opened(path: Path, methods: Iterable[Method]) -> Iterator[ModelFile]:
    """Open a file and read its header; entries without a checksum, or the other way round, are refused."""
    try:
        file = safe_open(path, framework="pt")
    except PermissionError:
        raise
    except Exception as error:  # whatever safetensors raises on bytes that are not its own
        raise ValueError(f"damaged, or not a file of decomp.save ({error})") from error
    with file:
        entries: Any = file
        header = Header.from_metadata(entries.metadata(), methods)
        shapes = {name: tuple(entries.get_slice(name).get_shape()) for name in entries.keys()}  # noqa: SIM118
        for name in sorted(shapes.keys() ^ header.checksums.keys()):
            raise ValueError(f"damaged: its header and its entries differ on {name!r}")
        yield ModelFile(header, shapes, file)


def _fill(model: nn.Module, file: ModelFile, device: torch.device | None) -> None:
    """Put the values of the file into every parameter and buffer of a model.

    Raises:
        ValueError: the names, shapes or ties of the two differ, or an entry is damaged; the message names it.
    """
    found = places(model)
    _require_same_names(found, file)
    groups: dict[int, list[str]] = {}
    for name, place in found.items():
        if file.entry_of(name) is not None:
            groups.setdefault(id(place.tensor), []).append(name)
    for names in groups.values():
        entries = {file.entry_of(name): name for name in names}
        if len(entries) > 1:
            one, two = list(entries.values())[:2]
            raise ValueError(f"{one!r} and {two!r} are one tensor in the model, and two in the file")
        (entry,) = entries
        new = _filled(found[names[0]], str(entry), file, device)
        for name in names:
            found[name].put(new)
    for name in file.shapes.keys() - {file.entry_of(name) for name in found}:
        file.tensor(name)  # not used by this model, but a damaged file is refused whole


def _require_same_names(found: dict[str, Place], file: ModelFile) -> None:
    for name, place in found.items():
        entry = file.entry_of(name)
        if entry is None and (place.persistent or place.tensor.is_meta):
            raise ValueError(f"it has no entry {name!r}, which the model has: was it made of another model?")
        if entry is not None and place.persistent:
            _require_same_shape(name, place.tensor, file.shapes[entry])
    for name in [*file.shapes, *file.header.shared]:
        if name not in found and name not in file.header.not_in_state:
            raise ValueError(f"its entry {name!r} is not in the model: was it made of another model?")


def _require_same_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if is_lazy(tensor):
        raise ValueError(f"{name!r} of the model is not initialized yet: run one batch through the model first")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"its entry {name!r} has the shape {shape}, the model needs {tuple(tensor.shape)}")


def _filled(place: Place, entry: str, file: ModelFile, device: torch.device | None) -> Tensor:
    """A tensor with the values of an entry, in the memory format of the one that it replaces."""
    old, value = place.tensor, file.tensor(entry)
    if device is None:
        device = torch.device("cpu") if old.is_meta else old.device
    if old.shape == value.shape:
        new = torch.empty_like(old, dtype=value.dtype, device=device, requires_grad=False).copy_(value)
    else:
        new = value.to(device, copy=True)  # a buffer outside of the state dict, which may have grown
    if not place.is_parameter:
        return new
    if new.dtype.is_floating_point != old.dtype.is_floating_point:
        raise ValueError(f"its entry {entry!r} is of dtype {new.dtype}, the model needs {old.dtype}")
    return nn.Parameter(new, requires_grad=old.requires_grad)
