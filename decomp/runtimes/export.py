"""``decomp.export``: a model as a file of ONNX, OpenVINO or torch.export, checked against PyTorch."""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from decomp._util import tables
from decomp._util.io import UNFINISHED
from decomp._util.warn import warn
from decomp.data.batches import Batches
from decomp.network.forward import call, evaluating, to_device_of
from decomp.network.restoring import all_or_nothing
from decomp.network.surgery import check_model
from decomp.runtimes.inference import for_inference
from decomp.runtimes.int8_ranges import with_like_ranges
from decomp.runtimes.onnx_files import OnnxSession, write_onnx
from decomp.runtimes.openvino_models import OpenVinoModel, graph_of, read_openvino, write_openvino
from decomp.runtimes.program import Program, export_program

FORMATS = {".onnx": "ONNX", ".xml": "OpenVINO", ".pt2": "torch.export"}
LARGEST_ERROR = 1e-3
LARGE_ERROR_OF_INT8 = 0.3


@dataclass(frozen=True)
class Exported:
    """What :func:`decomp.export` wrote.

    Args:
        path: the file.
        format: "ONNX", "OpenVINO" or "torch.export".
        precision: "f32", or "int8".
        bytes: size on disk, of all files together.
        inputs: their names in the file.
        outputs: their names in the file.
        error: the largest difference to the outputs of the model in PyTorch, on ``example_inputs``, or on the
            first batch of ``int8``, for quantized ranges hold for inputs like those.
        relative_error: the norm of the difference over that of the outputs.
        fixed_batch: why the first axis is fixed to that of ``example_inputs``; empty where it is open.
    """

    path: Path
    format: str
    precision: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float
    relative_error: float
    fixed_batch: str = ""

    def __str__(self) -> str:
        batch = f"fixed batch ({self.fixed_batch})" if self.fixed_batch else "any batch"
        on = " on the first batch of the data" if self.precision == "int8" else ""
        return (
            f"{self.path}: {self.format} {self.precision}, {tables.number(self.bytes)} bytes, "
            f"{', '.join(self.inputs)} => {', '.join(self.outputs)}, {batch}; against PyTorch{on}: largest error "
            f"{self.error:.2g}, relative error {self.relative_error:.2g}"
        )


@all_or_nothing()
def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    int8: Iterable[Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    fold: bool = True,
) -> Exported:
    """Write a model as a file for another runtime, and check that file against the model in PyTorch.

    The first axis of inputs and outputs is open where torch.export can leave it so; other axes have the sizes of
    ``example_inputs``. Inputs have the names of the arguments of ``forward``, outputs "output", or the keys of a
    dict or dataclass, or "output_0" and so on. The file is written beside ``path`` first: if anything fails,
    ``path`` has its old content. A warning says where int8 changes the outputs by more than 0.3 of their size.

    Args:
        model: any model, compressed or not; it is not changed.
        path: of the file; the ending chooses the format: ``.onnx``, ``.xml`` (OpenVINO, with the weights in a
            ``.bin`` beside it) or ``.pt2`` (torch.export).
        example_inputs: a batch as the model is called with.
        int8: batches to choose the ranges of the activations on: weights and activations are quantized, by
            onnxruntime's static quantizer (models with attention by its dynamic one) or by NNCF. A few dozen are
            enough. The channels between the factors of a layer are scaled before, each by a constant that the next
            factor takes back, to ranges that are alike.
        inputs: what the model is called with, from a batch of ``int8``.
        fold: apply :func:`decomp.for_inference` first.

    Raises:
        ValueError: the ending is unknown, the folder is missing, ``int8`` is empty or given for ``.pt2``, or the
            file computes something else than the model (a relative error over 0.001 without ``int8``).
        TypeError: torch.export cannot export the model; the message says why.
        ImportError: a package of the format is not installed.

    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/small.pt2"
    >>> done = export(nn.Linear(4, 2), path, torch.zeros(1, 4))
    >>> done.format, done.inputs, done.outputs, done.error
    ('torch.export', ('input',), ('output',), 0.0)
    """
    check_model(model)
    path = Path(path)
    form = FORMATS.get(path.suffix)
    if form is None:
        raise ValueError(f"path={str(path)!r}: the ending must be one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    data = None if int8 is None else list(Batches(int8, inputs, one_pass=True))
    if data is not None and (form == "torch.export" or not data):
        problem = "torch.export has no int8 here: write .onnx or .xml" if data else "int8= has no batch"
        raise ValueError(f"path={str(path)!r}: {problem}")
    judged = example_inputs if data is None else data[0]
    with evaluating(model), torch.no_grad():
        expected = call(model, to_device_of(model, judged))
    ready = for_inference(model, example_inputs) if fold else model
    program = export_program(ready if data is None else with_like_ranges(ready, data), example_inputs)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        result = _written(form, program, temporary, data)(judged)
        error, relative = _difference(expected, result)
        if not relative <= LARGEST_ERROR and not (data is not None and relative < float("inf")):
            raise ValueError(
                f"the {form} file computes something else than the model: relative error {relative:.2g} on "
                f"{'example_inputs' if data is None else 'the first batch of int8='}; nothing was written"
            )
        if data is not None and relative > LARGE_ERROR_OF_INT8:
            warn(
                f"int8 changes the outputs of {type(model).__name__} by {relative:.2g} of their size on the first "
                "batch of int8=: score the file before you ship it, and give more batches, or export without int8="
            )
        files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)  # the main file last
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.parent / file.name)
    precision = "f32" if data is None else "int8"
    return Exported(
        path, form, precision, size, program.inputs, program.outputs, error, relative, program.fixed_batch
    )


def _written(form: str, program: Program, path: Path, data: list[Any] | None) -> Callable[[Any], Any]:
    """Write the file, and return what runs it."""
    threads = torch.get_num_threads()
    if form == "ONNX":
        write_onnx(program, path, data)
        return OnnxSession(program, path, threads)
    if form == "OpenVINO":
        write_openvino(graph_of(program, data), path)
        return OpenVinoModel(program, read_openvino(path), threads, "f32")
    torch.export.save(program.exported, path)
    loaded = torch.export.load(path).module()

    def run(batch: Any) -> Any:
        with torch.no_grad():
            return call(loaded, batch)

    return run


def _difference(expected: Any, result: Any) -> tuple[float, float]:
    """The largest difference of two outputs, and the norm of the difference as a share of the first's."""
    pairs = [
        (one.detach().cpu().double().flatten(), other.detach().double().flatten())
        for one, other in zip(tree_leaves(expected), tree_leaves(result), strict=True)
        if isinstance(one, Tensor)
    ]
    known, found = (torch.cat(each) for each in zip(*pairs, strict=True))
    norm = float(known.norm())
    distance = float((known - found).norm())
    return float((known - found).abs().max()), distance / norm if norm else distance
