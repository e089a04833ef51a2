"""The processes of a training run, usually a single one: sums and means over them, devices, mixed precision."""

import atexit
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from decomp.network.restoring import on_failure, restoring_values, temporarily


@contextmanager
def process_group(accelerator: Any, *models: nn.Module | None) -> Iterator["ProcessGroup"]:
    """The processes of an ``Accelerator``, or those of the launch; in the block the models are on the device.

    Raises:
        ImportError: accelerate is not installed.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ImportError("fine-tuning runs on accelerate: pip install 'decomp[finetune]'") from None
    group = _default_group(*models) if accelerator is None else ProcessGroup.of(accelerator)
    with group.on_device(*models):
        yield group


def _default_group(*models: nn.Module | None) -> "ProcessGroup":
    """The processes to train with where the caller names none.

    The state of accelerate is global: an ``Accelerator`` made here would fix the precision of every later one. So
    one is made only where the program has one already, or where its launcher asks for a mixed precision. Several
    processes need no more than ``PartialState``, which fixes no precision, and a process by itself needs nothing.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import GradientState, is_initialized
    from accelerate.utils import get_cpu_distributed_information, parse_flag_from_env

    if is_initialized() or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        # The number of steps is global as well, and stays as it is.
        group = ProcessGroup.of(Accelerator(gradient_accumulation_steps=GradientState().num_steps))
    elif torch.distributed.is_initialized() or get_cpu_distributed_information().world_size > 1:
        began = torch.distributed.is_initialized()
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if not began:
            atexit.register(_end_process_group)
        group = ProcessGroup(state.device, int(state.process_index), int(state.num_processes))
    else:
        on_gpu = torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        group = ProcessGroup((torch.accelerator.current_accelerator() if on_gpu else None) or torch.device("cpu"))
    elsewhere = [device for device in map(_device_of, filter(None, models)) if device and device.type != "cpu"]
    if group.size == 1 and elsewhere:
        group.device = elsewhere[0]
    return group


def _end_process_group() -> None:
    """End what was begun here: threads of a backend that still run when Python ends can abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class ProcessGroup:
    """The processes that train together: this one is number ``rank`` of ``size``, and computes on ``device``.

    Gradients are averaged here, not by ``DistributedDataParallel``: the model stays the object that it is, with
    its hooks and names, and a layer that only some of the processes reach in a step is no error.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1, accelerator: Any = None) -> None:
        self.device, self.rank, self.size = device, rank, size
        self._accelerator = accelerator
        self.accumulation_steps = 1 if accelerator is None else int(accelerator.gradient_accumulation_steps)
        self._mixed_precision = "no" if accelerator is None else str(accelerator.mixed_precision)
        self._scaler = None if accelerator is None else accelerator.scaler

    @classmethod
    def of(cls, accelerator: Any) -> "ProcessGroup":
        """The processes of an ``accelerate.Accelerator``, with its mixed precision and accumulated gradients."""
        return cls(accelerator.device, int(accelerator.process_index), int(accelerator.num_processes), accelerator)

    def identity(self) -> dict[str, Any]:
        """The settings that a run must share with the checkpoint it resumes from."""
        return {
            "processes": self.size,
            "accumulation": self.accumulation_steps,
            "precision": self._mixed_precision,
        }

    def totals(self, *values: float) -> list[float]:
        """The sums of some numbers over the processes, the same on each of them."""
        if self.size == 1:
            return list(values)
        from accelerate.utils import reduce

        here = torch.tensor(values, dtype=torch.float64, device=self.device)
        return list(reduce(here, "sum").tolist())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in one message for each dtype."""
        if self.size == 1:
            return
        from accelerate.utils import reduce

        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            means = reduce(torch.cat([tensor.reshape(-1) for tensor in alike]), "mean")
            for tensor, mean in zip(alike, means.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def broadcast(self, model: nn.Module) -> None:
        """Give every process the weights of the first one."""
        if self.size > 1:
            from accelerate.utils import broadcast

            on_failure(restoring_values(model))

            with torch.no_grad():
                for tensor in chain(model.parameters(), model.buffers()):
                    tensor.copy_(broadcast(tensor.detach().contiguous()))

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, ordered by rank."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in the mixed precision of the ``Accelerator``."""
        if self._accelerator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def backward(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Accumulate gradients of the loss, scaled for half precision and divided by the batches of a step."""
        if self._accelerator is None:
            loss.backward(inputs=list(parameters))
        else:
            self._accelerator.backward(loss, inputs=list(parameters))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step with the gradients of :meth:`backward`."""
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def scaler_state(self) -> dict[str, Any]:
        """The state of the scaler of half-precision gradients."""
        return {} if self._scaler is None else dict(self._scaler.state_dict())

    def set_scaler_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`scaler_state` returned."""
        if state and self._scaler is not None:
            self._scaler.load_state_dict(state)

    @contextmanager
    def on_device(self, *models: nn.Module | None) -> Iterator[None]:
        """Move the models to the device of this process for the block, and back after it."""
        homes = [(model, _device_of(model)) for model in models if model is not None]
        moving = [(model, home) for model, home in homes if home is not None and home != self.device]

        def back() -> None:
            for model, home in moving:
                model.to(home)

        with temporarily(back):
            for model, _ in moving:
                model.to(self.device)
            yield


def _device_of(model: nn.Module) -> torch.device | None:
    """The device of a model that is on one device."""
    tensors: Iterable[Tensor] = chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 else None
