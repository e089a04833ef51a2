"""The processes that train together, one as a rule: what they add up, average and keep alike, on accelerate."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Team:
    """An ``Accelerator`` as training needs it: sums and means over the processes, scaled steps, a device.

    Gradients are averaged here, not by ``DistributedDataParallel``: the model stays the object that it is, with
    its hooks and names, and a layer that only some of the processes reach in a step is no error.
    """

    def __init__(self, accelerator: Any, device: torch.device | None = None) -> None:
        self._accelerator = accelerator
        self.device: torch.device = device or accelerator.device
        self.rank = int(accelerator.process_index)
        self.size = int(accelerator.num_processes)
        self.accumulation = int(accelerator.gradient_accumulation_steps)
        self.precision = str(accelerator.mixed_precision)

    def identity(self) -> dict[str, Any]:
        """What of the processes a checkpoint has to remember."""
        return {"processes": self.size, "accumulation": self.accumulation, "precision": self.precision}

    def totals(self, *values: float) -> list[float]:
        """The sums of some numbers over the processes, the same on each of them."""
        if self.size == 1:
            return list(values)
        here = torch.tensor(values, dtype=torch.float64, device=self.device)
        return list(self._accelerator.reduce(here, "sum").tolist())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes; one message for each type of number."""
        if self.size == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            means = self._accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in alike]), "mean")
            for tensor, mean in zip(alike, means.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def spread(self, model: nn.Module) -> None:
        """Give every process the weights of the first one."""
        if self.size > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                for tensor in chain(model.parameters(), model.buffers()):
                    tensor.copy_(broadcast(tensor.detach().contiguous()))

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.size > 1:
            self._accelerator.wait_for_everyone()

    def autocast(self) -> AbstractContextManager[Any]:
        """The block runs in the mixed precision of the ``Accelerator``."""
        block: AbstractContextManager[Any] = self._accelerator.autocast()
        return block

    def backward(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Gradients of the loss, scaled for half precision and divided by the batches of a step."""
        self._accelerator.backward(loss, inputs=list(parameters))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step with the gradients of :meth:`backward`."""
        scaler = self._accelerator.scaler
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def scaler_state(self) -> dict[str, Any]:
        """Where the scale of half-precision gradients stands."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def set_scaler_state(self, state: dict[str, Any]) -> None:
        """Put the scale where :meth:`scaler_state` found it."""
        if state:
            self._accelerator.scaler.load_state_dict(state)

    @contextmanager
    def hosting(self, *models: nn.Module | None) -> Iterator[None]:
        """Have the models on the device of this process in the block, and where they were after it."""
        homes = [(model, _device_of(model)) for model in models if model is not None]
        moving = [(model, home) for model, home in homes if home is not None and home != self.device]
        try:
            for model, _ in moving:
                model.to(self.device)
            yield
        finally:
            for model, home in moving:
                model.to(home)


@contextmanager
def team(accelerator: Any, *models: nn.Module | None) -> Iterator[Team]:
    """The processes of an ``Accelerator``, or of a default one; the models are on its device in the block.

    Raises:
        ImportError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        raise ImportError("fine-tuning runs on accelerate: pip install 'decomp[finetune]'") from None
    # The state of accelerate is global: one that is left would forbid the caller an Accelerator of his own later.
    alone = accelerator is None and not AcceleratorState._shared_state
    try:
        together = Team(accelerator or Accelerator())
        away = [device for device in map(_device_of, filter(None, models)) if device and device.type != "cpu"]
        if accelerator is None and together.size == 1 and away:
            together.device = away[0]
        with together.hosting(*models):
            yield together
    finally:
        if alone:
            AcceleratorState._reset_state()


def _device_of(model: nn.Module) -> torch.device | None:
    """The device of a model that is on one device."""
    tensors: Iterable[Tensor] = chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 else None
