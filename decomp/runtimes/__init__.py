"""Where a model runs and how fast: ``decomp.runtimes.RUNTIMES``, and records of the user's own."""

from decomp.runtimes.onnx_files import onnxruntime
from decomp.runtimes.openvino_models import openvino
from decomp.runtimes.pytorch import compiled, eager
from decomp.runtimes.record import InRuntime, Runtime, find, ready
from decomp.runtimes.timing import Ratio, Timing, ratio, time_in_turn

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        eager(),
        eager(channels_last=True),
        eager(bf16=True),
        compiled(),
        onnxruntime(),
        onnxruntime(int8=True),
        openvino(),
        openvino("bf16"),
        openvino("int8"),
    )
}
"""The built-in runtimes by name; the argument ``runtime=`` of a call takes a name or a record.

:meta hide-value:
"""

__all__ = [
    "RUNTIMES",
    "InRuntime",
    "Ratio",
    "Runtime",
    "Timing",
    "compiled",
    "eager",
    "find",
    "onnxruntime",
    "openvino",
    "ratio",
    "ready",
    "time_in_turn",
]
