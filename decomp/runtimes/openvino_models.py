"""OpenVINO, with int8 by NNCF."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from decomp._util.optional import needing
from decomp.network.restoring import lock
from decomp.runtimes.processor import int8_sums_saturate
from decomp.runtimes.program import Program, export_program, quiet
from decomp.runtimes.record import Runtime

NEEDS = "runtimes and files of OpenVINO need {package}: pip install 'decomp[openvino]'"
PRECISIONS = ("f32", "bf16", "int8")


def openvino(precision: str = "f32", *, threads: int | None = None) -> Runtime:
    """OpenVINO on the CPU, tuned for latency.

    Args:
        precision: "f32"; "bf16", in which the device then computes; or "int8", weights and activations quantized
            by ``nncf.quantize`` with ``data``.
        threads: by default as many as torch has.

    Raises:
        ValueError: the precision is unknown.

    >>> openvino("int8").name
    'openvino-int8'
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: write one of {', '.join(map(repr, PRECISIONS))}")

    def prepare(model: nn.Module, example_inputs: Any, data: Sequence[Any], threads: int) -> Callable[[Any], Any]:
        program = export_program(model, example_inputs)
        graph = graph_of(program, data if precision == "int8" else None)
        return OpenVinoModel(program, graph, threads, "bf16" if precision == "bf16" else "f32")

    name = "openvino" if precision == "f32" else f"openvino-{precision}"
    return Runtime(name, prepare, precision, threads, precision == "int8")


_MAKING = lock()


def core() -> Any:
    """OpenVINO's core, one for the whole process.

    On processors with AMX each core sets an alternate stack for signals, and restores the one before at its end.
    Two of them that do not end in the reverse order leave a stack behind that is gone: the next signal that Python
    handles, a Ctrl-C for example, crashes the process.
    """
    with _MAKING:
        return _made()


@cache
def _made() -> Any:
    import openvino as ov

    return ov.Core()


def graph_of(program: Program, data: Sequence[Any] | None) -> Any:
    """Convert a program to OpenVINO's model, with ``data`` quantized to int8."""
    with needing("openvino", NEEDS.format(package="openvino")):
        import openvino as ov
    core()  # before those that NNCF makes and drops
    with quiet():
        graph = ov.convert_model(program.exported)
        for names, ports in ((program.inputs, graph.inputs), (program.outputs, graph.outputs)):
            for name, port in zip(names, ports, strict=True):
                port.get_tensor().set_names({name})
        return graph if data is None else _quantized(program, graph, data)


def _quantized(program: Program, graph: Any, data: Sequence[Any]) -> Any:
    with needing("nncf", NEEDS.format(package="nncf")), contextlib.redirect_stdout(io.StringIO()):
        import nncf
    batches = [program.arrays(batch) for batch in data]
    samples = [each[0] if len(each) == 1 else dict(zip(program.inputs, each, strict=True)) for each in batches]
    options: dict[str, Any] = {}
    if int8_sums_saturate():  # weights of 7 bits, not in the first layers alone
        fix = nncf.OverflowFix.ENABLE
        options["advanced_parameters"] = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
    if program.attends:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return nncf.quantize(graph, nncf.Dataset(samples), subset_size=len(samples), **options)


class OpenVinoModel:
    """Runs a model of OpenVINO on the CPU: compiled for the exact sizes of a batch, once for each."""

    def __init__(self, program: Program, graph: Any, threads: int, precision: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_openvino(graph, Path(folder) / "model.xml")
            self.bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        self._program, self._graph = program, graph
        self._options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, batch: Any) -> Any:
        arrays = self._program.arrays(batch)
        shapes = tuple(each.shape for each in arrays)
        if shapes not in self._requests:
            self._requests[shapes] = self._compiled(shapes)
        result = self._requests[shapes].infer([np.ascontiguousarray(each) for each in arrays], share_inputs=True)
        return self._program.result(list(result.values()))

    def _compiled(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        graph = self._graph.clone()
        graph.reshape({port: list(shape) for port, shape in zip(graph.inputs, shapes, strict=True)})
        return core().compile_model(graph, "CPU", self._options).create_infer_request()


def write_openvino(graph: Any, path: Path) -> None:
    """Write ``path`` (.xml) and the weights beside it (.bin), in the precision of the model."""
    import openvino as ov

    ov.save_model(graph, path, compress_to_fp16=False)


def read_openvino(path: Path) -> Any:
    """Read what :func:`write_openvino` wrote."""
    return core().read_model(path)
