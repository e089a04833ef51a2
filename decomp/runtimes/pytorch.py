"""PyTorch itself: eager, and torch.compile."""

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from decomp.network.forward import call, evaluating, to_device_of
from decomp.network.surgery import swap
from decomp.runtimes.program import quiet
from decomp.runtimes.record import Runtime


def eager(*, bf16: bool = False, channels_last: bool = False, threads: int | None = None) -> Runtime:
    """PyTorch eager.

    Args:
        bf16: weights and activations in bfloat16; outputs are given in float32.
        channels_last: weights of convolutions and inputs in this memory format.
        threads: by default as many as torch has.

    >>> eager(bf16=True).name
    'eager-bf16'
    """
    name = "eager" + "-channels-last" * channels_last + "-bf16" * bf16

    def prepare(model: nn.Module, example_inputs: Any, data: Sequence[Any], threads: int) -> Callable[[Any], Any]:
        return _InTorch(_copy(model), threads, bf16=bf16, channels_last=channels_last)

    return Runtime(name, prepare, "bf16" if bf16 else "f32", threads)


def compiled(*, threads: int | None = None) -> Runtime:
    """torch.compile with its default backend, inductor, which needs a C++ compiler on a CPU."""

    def prepare(model: nn.Module, example_inputs: Any, data: Sequence[Any], threads: int) -> Callable[[Any], Any]:
        on_cpu = next((p.device.type for p in model.parameters()), "cpu") == "cpu"
        if on_cpu and sys.platform != "win32" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ImportError("runtime='compile' needs a C++ compiler (g++ or clang++): install one")
        with quiet():
            run = _InTorch(torch.compile(_copy(model), dynamic=False), threads)
            run(example_inputs)  # compiles
        return run

    return Runtime("compile", prepare, "f32", threads)


def _copy(model: nn.Module) -> nn.Module:
    with evaluating(model):
        copied = swap(model, {}, inplace=False)
    for module in copied.modules():
        module.training = False
    return copied


class _InTorch:
    """Calls a model without gradients, with a number of threads, and waits for the device."""

    def __init__(self, model: Any, threads: int, *, bf16: bool = False, channels_last: bool = False) -> None:
        self.bf16, self.channels_last, self.threads = bf16, channels_last, threads
        if bf16:
            model.to(torch.bfloat16)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model
        parameters = list(model.parameters())
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.bytes = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))

    def __call__(self, batch: Any) -> Any:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                result = self._call(to_device_of(self.model, batch))
        finally:
            if before != self.threads:
                torch.set_num_threads(before)
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)
        return result

    def _call(self, batch: Any) -> Any:
        if self.bf16 or self.channels_last:
            batch = tree_map_only(Tensor, self._converted, batch)
        result = call(self.model, batch)
        return tree_map_only(Tensor, _as_float32, result) if self.bf16 else result

    def _converted(self, tensor: Tensor) -> Tensor:
        if self.bf16 and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        if self.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
