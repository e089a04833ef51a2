"""Calls and MACs of the layers of a model in one forward pass, and weights that are read outside their layer."""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from decomp.network.forward import Unfused, call, evaluating, hooked, to_device_of


class Call(NamedTuple):
    """One call of a layer: the shape of its input, and ``output_size=`` of a transposed convolution.

    For packed sequences ``shape`` is that of their rows, and ``batch_sizes`` the number of sequences at each step.
    """

    shape: tuple[int, ...]
    output_size: tuple[int, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None


@dataclass
class ForwardPass:
    """One forward pass: the calls and the MACs of each module, in the order of execution.

    Modules that are not called are left out. ``total_macs`` are the MACs of the whole model. ``read`` are the
    modules whose weight is used outside of their own forward, ``uncounted`` the operators whose MACs are not
    known.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    total_macs: int = 0
    uncounted: Counter[str] = field(default_factory=Counter)


class MacCounter(FlopCounterMode):
    """torch's flop counter with formulas for the operators that it leaves out; one multiply-add is 1.

    ``uncounted`` are the operators that multiply and have no formula, with how often they were called.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        # torch's tracker of modules fails where a view of a parameter is an argument of a module; sums need none.
        self.mod_tracker: Any = _OneModule()
        self._watch: Any = _WatchUncounted(self.flop_registry)

    def __enter__(self) -> "MacCounter":
        self._watch.__enter__()  # before the counter, so that it is shown what that has decomposed
        super().__enter__()  # type: ignore[no-untyped-call]
        for mode in (self._watch, self.mode):
            _without_import_of_the_compiler(mode)
        return self

    def __exit__(self, *error: Any) -> Any:
        suppressed = super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._watch.__exit__(*error)
        return suppressed

    @property
    def macs(self) -> int:
        return int(self.get_total_flops()) // 2

    @property
    def uncounted(self) -> Counter[str]:
        """Operators that multiply and have no formula."""
        operators: Counter[str] = self._watch.operators
        return operators


def _without_import_of_the_compiler(mode: Any) -> None:
    """Let a mode's ``__torch_dispatch__`` run as it was written, if torch.compile was not used in this process.

    torch wraps that method to keep torch.compile out of it, and the wrapper imports torch._dynamo on the first
    call, which takes about a second. As long as that is not imported, there is nothing to keep out.
    """
    raw = getattr(type(mode).__torch_dispatch__, "__wrapped__", None)
    if raw is not None and "torch._dynamo" not in sys.modules:
        mode.__torch_dispatch__ = MethodType(raw, mode)


class _OneModule:
    """In place of torch's module tracker: everything belongs to the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "_OneModule":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _WatchUncounted(TorchDispatchMode):
    """Notes operators without a formula whose name says that they multiply, or that are no operators of torch."""

    supports_higher_order_operators = True

    def __init__(self, registry: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._registry = registry
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self._registry:
            name = str(packet)
            foreign = getattr(func, "namespace", "aten") not in _OPERATORS_OF_TORCH
            if foreign or _MULTIPLYING.search(name):
                self.operators[name] += 1
        output_shape = _OUTPUT_SHAPES.get(func)
        if output_shape is not None and args[0].is_meta:
            return args[0].new_empty(output_shape(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def uncounted_note(operators: Mapping[str, int]) -> str:
    """What a table says of operators whose MACs are not known.

    >>> uncounted_note({"aten._fft_r2c": 2})
    'not counted: aten._fft_r2c (2 calls)'
    """
    calls = (f"{name} ({count} call{'s' if count > 1 else ''})" for name, count in operators.items())
    return f"not counted: {', '.join(calls)}"


def observe(model: nn.Module, batch: Any, modules: Mapping[str, nn.Module]) -> ForwardPass:
    """Run one batch in eval mode without gradients; return the calls and MACs of ``modules`` in it."""
    result = ForwardPass()
    running: list[str] = []
    batch = to_device_of(model, batch)

    def before(name: str, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        running.append(name)
        received: Any = positional[0] if positional else next(iter(keywords.values()), None)
        size = keywords.get("output_size", positional[1] if len(positional) > 1 else None)
        size = tuple(size) if isinstance(size, tuple | list) else None
        batch_sizes = None
        if isinstance(received, PackedSequence):
            batch_sizes = tuple(received.batch_sizes.tolist())
            received = received.data
        shape = tuple(getattr(received, "shape", ()))
        result.calls.setdefault(name, []).append(Call(shape, size, batch_sizes))

    def after(name: str) -> None:
        running.remove(name)

    weights = {id(module.weight): name for name, module in modules.items() if isinstance(_weight(module), Tensor)}
    with MacCounter() as counter, _Reads(weights, running, result.read):
        macs = measure_per_module(model, batch, modules, lambda: counter.macs, before, after)
    result.macs = {name: int(value) for name, value in macs.items()}
    result.total_macs = counter.macs
    result.uncounted = counter.uncounted
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


def _grouped_mm_flops(left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Every row of the left side is multiplied by one of the matrices.

    Shapes are (rows, K) x (groups, K, N) and (groups, M, K) x (groups, K, N). If the right side is one matrix, the
    groups divide its columns, (groups, M, K) x (K, N), or the inner dimension of both sides, (M, K) x (K, N).
    """
    rows = left[-2:] if len(right) == 2 else left
    return int(2 * math.prod(rows) * right[-1])


def _rnn_layer_flops(
    input: Any, weight_ih: Any, weight_hh: Any, *args: Any, out_shape: Any = None, **_: Any
) -> int:
    """One direction of one layer, as the CPU runs it: both weights at every step of every sequence."""
    steps = math.prod(input[:-1])
    return int(2 * steps * (math.prod(weight_ih) + math.prod(weight_hh)))


def _cudnn_rnn_flops(input: Any, weights: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """All layers and directions: every matrix among the weights at every step of every sequence."""
    matrices = [shape for shape in weights if len(shape) == 2]
    return int(2 * math.prod(input[:-1]) * sum(map(math.prod, matrices)))


def _trilinear_flops(first: Any, second: Any, third: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """y[b, o] = sum_{i, j} x[b, i] W[o, i, j] z[b, j] as ``nn.Bilinear`` calls it: W z, then x."""
    rows, (outputs, inputs, others) = first[0], second[-3:]
    return int(2 * rows * outputs * (inputs * others + inputs))


def _product_flops(left: Any, right: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """A matrix or a vector by a vector: one multiply-add per entry of the left side."""
    return int(2 * math.prod(left))


def _added_product_flops(added: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return _product_flops(left, right)


_aten = torch.ops.aten
_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._grouped_mm: _grouped_mm_flops,
    _aten.mkldnn_rnn_layer: _rnn_layer_flops,
    _aten._cudnn_rnn: _cudnn_rnn_flops,
    _aten._trilinear: _trilinear_flops,
    _aten.mv: _product_flops,
    _aten.dot: _product_flops,
    _aten.addmv: _added_product_flops,
}


def _convolution_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int]:
    """The shape of a convolution's output, from the formulas in the documentation of nn.ConvNd."""
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True)
    if transposed:
        sizes = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in axes]
        return [len(x), weight.shape[1] * groups, *sizes]
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes]
    return [len(x), weight.shape[0], *sizes]


# Products on the meta device are answered with an empty output: torch has these kernels in Python there, and the
# first call of one imports sympy and torch._dynamo, which takes one to three seconds.
_OUTPUT_SHAPES: Mapping[Any, Callable[..., list[int]]] = {
    _aten.mm.default: lambda x, y: [x.shape[0], y.shape[1]],
    _aten.addmm.default: lambda bias, x, y, **scales: [x.shape[0], y.shape[1]],
    _aten.bmm.default: lambda x, y: [*x.shape[:2], y.shape[2]],
    _aten.convolution.default: _convolution_shape,
}
_OPERATORS_OF_TORCH = {"aten", "prim", "prims", "higher_order"}
# Whole words, so that lgamma, upsample_bilinear2d and convert_element_type do not count as products.
_MULTIPLYING = re.compile(
    r"(?<![a-z])(?:\w*mm(?![a-z])|conv(?:olution|_|\d)|(?:matmul|linear|bilinear|trilinear|vdot|cdist|einsum|tensordot"
    r"|attention|rnn|lstm|gru|encoder_layer|embedding_bag|fft)(?![a-z0-9]))"
)
