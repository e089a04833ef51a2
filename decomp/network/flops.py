"""Calls and MACs of the layers of a model in one forward pass, and weights that are read outside their layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from decomp.network.forward import Unfused, call, evaluating, hooked, to_device_of


class Call(NamedTuple):
    """One call of a layer: the shape of its input, and ``output_size=`` of a transposed convolution."""

    shape: tuple[int, ...]
    output_size: tuple[int, ...] | None = None


@dataclass
class ForwardPass:
    """One forward pass: the calls and the MACs of each module, in the order of execution.

    Modules that are not called are left out. ``total_macs`` are the MACs of the whole model. ``read`` are the
    modules whose weight is used outside of their own forward.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    total_macs: int = 0


class MacCounter(FlopCounterMode):
    """torch's flop counter, plus the attention kernel of the CPU, which torch does not count; in multiply-adds."""

    def __init__(self) -> None:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        super().__init__(display=False, custom_mapping={attention: _attention_flops})

    @property
    def macs(self) -> int:
        return int(self.get_total_flops()) // 2


def observe(model: nn.Module, batch: Any, modules: Mapping[str, nn.Module]) -> ForwardPass:
    """Run one batch in eval mode without gradients; return the calls and MACs of ``modules`` in it."""
    result = ForwardPass()
    running: list[str] = []
    batch = to_device_of(model, batch)

    def before(name: str, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        running.append(name)
        received = positional[0] if positional else next(iter(keywords.values()), None)
        size = keywords.get("output_size", positional[1] if len(positional) > 1 else None)
        size = tuple(size) if isinstance(size, tuple | list) else None
        result.calls.setdefault(name, []).append(Call(tuple(getattr(received, "shape", ())), size))

    def after(name: str) -> None:
        running.remove(name)

    weights = {id(module.weight): name for name, module in modules.items() if isinstance(_weight(module), Tensor)}
    with MacCounter() as counter, _Reads(weights, running, result.read):
        macs = measure_per_module(model, batch, modules, lambda: counter.macs, before, after)
    result.macs = {name: int(value) for name, value in macs.items()}
    result.total_macs = counter.macs
    return result


def measure_per_module(
    model: nn.Module,
    batch: Any,
    modules: Mapping[str, nn.Module],
    read: Callable[[], float],
    on_enter: Callable[[str, tuple[Any, ...], dict[str, Any]], None] = lambda name, positional, keywords: None,
    on_leave: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """The increase of a counter or clock, ``read()``, while each module runs, summed over its calls in one pass.

    The model runs in eval mode without gradients. The batch must be on its device.
    """
    spent: dict[str, float] = {}
    begun: dict[str, float] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            on_enter(name, positional, keywords)
            begun[name] = read()

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            spent[name] = spent.get(name, 0.0) + read() - begun[name]
            on_leave(name)

        return hook

    entering = [(module, before(name)) for name, module in modules.items()]
    leaving = [(module, after(name)) for name, module in modules.items()]
    with hooked(entering, leaving), evaluating(model), torch.no_grad():
        call(model, batch)
    return spent


class _Reads(Unfused):
    """Records the weights that are arguments of a torch function while their own layer is not running."""

    def __init__(self, weights: Mapping[int, str], running: list[str], read: set[str]) -> None:
        super().__init__()
        self._weights, self._running, self._read = weights, running, read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            name = self._weights.get(id(value))
            if name is not None and name not in self._running:
                self._read.add(name)
        return super().__torch_function__(func, types, args, kwargs)


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
