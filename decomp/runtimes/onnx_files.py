"""ONNX and onnxruntime."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from decomp._util.optional import needing
from decomp.runtimes.processor import int8_sums_saturate
from decomp.runtimes.program import Array, Program, export_program, quiet
from decomp.runtimes.record import Runtime

NEEDS = "runtimes and files of ONNX need {package}: pip install 'decomp[onnx]'"


def onnxruntime(*, int8: bool = False, threads: int | None = None) -> Runtime:
    """onnxruntime on the CPU.

    Args:
        int8: quantize weights (per channel) and activations by onnxruntime's static quantizer, with ``data``. Of
            a model with attention so are the convolutions; the products by its dynamic quantizer, which finds the
            ranges of activations anew in every call.
        threads: by default as many as torch has.

    >>> onnxruntime(int8=True).name
    'onnxruntime-int8'
    """

    def prepare(model: nn.Module, example_inputs: Any, data: Sequence[Any], threads: int) -> Callable[[Any], Any]:
        program = export_program(model, example_inputs)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(program, path, data if int8 else None)
            return OnnxSession(program, path, threads)

    return Runtime(f"onnxruntime{'-int8' * int8}", prepare, "int8" if int8 else "f32", threads, int8)


def write_onnx(program: Program, path: Path, data: Sequence[Any] | None) -> None:
    """Write a program as ONNX, with ``data`` quantized to int8."""
    import torch

    for package in ("onnx", "onnxscript"):
        with needing(package, NEEDS.format(package=package)):
            __import__(package)
    names: Any = {"input_names": list(program.inputs), "output_names": list(program.outputs)}
    with quiet():
        made: Any = torch.onnx.export(program.exported, dynamo=True, verbose=False, **names)
        if data is None:
            made.save(path)
            return
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "plain.onnx"
            made.save(plain)
            _quantize(program, plain, path, data)


def _quantize(program: Program, plain: Path, path: Path, data: Sequence[Any]) -> None:
    with needing("onnxruntime", NEEDS.format(package="onnxruntime")):
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_dynamic,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter(data)

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(program.inputs, program.arrays(batch), strict=True))

    folded = plain.with_name("folded.onnx")  # BatchNorm in the convolutions before it, and shapes
    quant_pre_process(plain, folded, skip_symbolic_shape=True)
    # A few channels of what attention reads are so large that one range for all data leaves nothing to the others.
    kinds = ["Conv"] if program.attends else ["Conv", "MatMul", "Gemm", "MaxPool", "Add", "Concat", "Relu"]
    target = plain.with_name("static.onnx") if program.attends else path
    # Weights of 7 bits where sums would saturate.
    shared: dict[str, Any] = {
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "reduce_range": int8_sums_saturate(),
    }
    quantize_static(
        folded,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=kinds,
        extra_options={"ForceQuantizeNoInputCheck": False},
        **shared,
    )
    if program.attends:
        options: dict[str, Any] = {"extra_options": {"MatMulConstBOnly": True}}
        quantize_dynamic(target, path, op_types_to_quantize=["MatMul", "Gemm"], **options, **shared)


class OnnxSession:
    """Runs an ONNX file in onnxruntime."""

    def __init__(self, program: Program, path: Path, threads: int) -> None:
        with needing("onnxruntime", NEEDS.format(package="onnxruntime")):
            import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [each.name for each in self._session.get_inputs()]
        self._program = program
        self.bytes = sum(file.stat().st_size for file in path.parent.iterdir() if file.name.startswith(path.name))

    def __call__(self, batch: Any) -> Any:
        given = dict(zip(self._program.inputs, self._program.arrays(batch), strict=True))
        arrays = self._session.run(None, {name: np.ascontiguousarray(given[name]) for name in self._names})
        return self._program.result(arrays)
