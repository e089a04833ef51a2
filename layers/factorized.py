"""The base class of factorized layers: a chain of factors, and its product, the dense weight."""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, TypeAlias, cast

import torch
from torch import Tensor, nn

from decomp.layers.kernels import is_input_first, join_kernels, kind_of, memory_format_of, weight_of

Absorbs: TypeAlias = Literal["full", "diagonal", "nothing"]
"""Which matrices before or after a layer can be multiplied into its factors, with no factor added."""

# What torch keeps of the parameters of a recurrent layer beside them; it sets these anew in every layer that it
# makes.
_OF_RECURRENT = ("_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights")
_OF_EVERY_MODULE = frozenset((*vars(nn.Module()), *dir(nn.Module), *_OF_RECURRENT))
_OF_FACTORIZED = frozenset(("ranks", "dense_type", "dense_shape", "input_first"))
_PLAIN = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device)


def attributes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that not every module has: its options, and what was set on it."""
    yield from ((name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)


def is_plain(value: object) -> bool:
    """Whether a value is a number, a string or the like, or a container of such: it leads to no tensor or module.

    >>> is_plain((3, "same")), is_plain([nn.ReLU()])
    (True, False)
    """
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


def copy_alone(layer: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Deep copy of a layer without the attributes that may lead out of it, to its parent for one."""
    outside = {name: value for name, value in attributes_of(layer) if not is_plain(value) and value is not layer}
    inside = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    left_out = {id(value): None for value in outside.values() if id(value) not in inside}
    # Hooks of other calls, in other threads: a layer with hooks of the user's is not decomposed.
    hooks = {id(value): type(value)() for name, value in list(vars(layer).items()) if name.endswith("_hooks")}
    new = copy.deepcopy(layer, {**hooks, **(memo or {}), **left_out})
    for name in outside:
        del vars(new)[name]
    return new


class Factorized(nn.Module):
    """A chain of ordinary torch layers that replaces one dense layer.

    The children carry the names of their roles (``reduce``, ``core``, ``expand``) and run in that order; only
    the last one has a bias. The attributes of the dense layer (``in_features``, ``stride``, ``bias``, ..., and
    plain values that were added to it) are available under the same names. ``weight`` is read-only, the product of
    the factors, computed at each access: what is written into the tensor that it returns
    (``nn.init.zeros_(layer.weight)``) is lost. Write to the factors.

    ``absorbs_inputs`` states which matrices M the first factor can absorb, K' = K M, and ``absorbs_outputs`` which
    the last one can, K' = M K: all, diagonal ones (if every channel has its own filters), or none.
    """

    method: ClassVar[str]
    absorbs_inputs: ClassVar[Absorbs] = "full"
    absorbs_outputs: ClassVar[Absorbs] = "full"
    ranks: tuple[int, ...]
    dense_type: type[nn.Module]
    dense_shape: tuple[int, ...]
    input_first: bool

    def __init__(self, dense: Any, ranks: tuple[int, ...], device: Any) -> None:
        super().__init__()
        for name, value in attributes_of(dense):
            if is_plain(value) and not hasattr(type(self), name):
                setattr(self, name, copy.deepcopy(value))  # what leads elsewhere is copied by the swap
        self.ranks = ranks
        self.dense_type = kind_of(dense)
        self.dense_shape = tuple(weight_of(dense).shape)  # known without multiplying the factors
        self.input_first = is_input_first(dense)
        self.build(dense, device)

    @abstractmethod
    def build(self, dense: Any, device: Any) -> None:
        """Create the children, in the order in which they run."""

    @classmethod
    def like(cls, dense: Any, ranks: tuple[int, ...], *, device: object = None) -> Self:
        """Build the layer with torch's default initialization, on the device of ``dense`` or the given one."""
        layer = cls(dense, tuple(ranks), dense.weight.device if device is None else device)
        layer.train(dense.training)
        for name, parameter in layer.named_parameters():
            source = dense.bias if name.endswith("bias") else dense.weight
            parameter.requires_grad_(source.requires_grad)
        format = memory_format_of(dense.weight)
        if format is not torch.contiguous_format:
            cast(Any, layer).to(memory_format=format)
        return layer

    @classmethod
    def from_factors(cls, dense: Any, factors: Any) -> Self:
        """Build the layer that runs ``factors``, with the bias, flags, device and dtype of ``dense``.

        Raises:
            ValueError: a factor does not fit the dense layer.
        """
        return cls.from_kernels(dense, cls.factor_kernels(dense, factors))

    @classmethod
    def from_kernels(cls, dense: Any, kernels: Mapping[str, Tensor]) -> Self:
        """Build the layer from one kernel per role, as :meth:`factor_kernels` gives them.

        Raises:
            ValueError: a kernel does not fit the dense layer.
        """
        layer = cls.like(dense, cls.ranks_of(kernels), device="meta")
        for role, child in layer.named_children():
            layer.fill(child, kernels.get(role), dense, f"{cls.__name__}.{role}")
        return layer

    def fill(self, child: Any, kernel: Tensor | None, dense: Any, where: str) -> None:
        """Set the kernel of a child, if one is given, and its bias, if it has one, to that of ``dense``.

        Raises:
            ValueError: the kernel does not fit; ``where`` names the child.
        """
        _fill(child, kernel, dense, where)

    @classmethod
    @abstractmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        """Turn factors, as the method returns them, into one kernel (groups, out, in, ...) per role.

        The roles are in the order in which they run.
        """

    @classmethod
    def mix_inputs(cls, kernels: Mapping[str, Tensor], mixing: Tensor) -> dict[str, Tensor]:
        """The kernels of K' = K M, K'[t, s] = sum_r K[t, r] M[r, s], for M of shape (groups, S, S).

        Only the part of M that the layer absorbs (``absorbs_inputs``) is used.
        """
        if cls.absorbs_inputs == "nothing":
            return dict(kernels)
        role, kernel = next(iter(kernels.items()))
        if cls.absorbs_inputs == "full":
            mixed = torch.einsum("gor...,grs->gos...", kernel, mixing)
        else:
            scale = mixing.diagonal(dim1=1, dim2=2).flatten()
            mixed = kernel * scale.reshape(-1, *(1,) * (kernel.dim() - 1))
        return {**kernels, role: mixed}

    @classmethod
    def expand_outputs(cls, kernels: Mapping[str, Tensor], basis: Tensor) -> dict[str, Tensor]:
        """The kernels of K' = B K, B of shape (groups, T, r): merged with a last 1x1 convolution, or one more."""
        expand = kernels.get("expand")
        return {**kernels, "expand": basis if expand is None else basis @ expand.flatten(2)}

    @classmethod
    def mix_outputs(cls, kernels: Mapping[str, Tensor], mixing: Tensor) -> dict[str, Tensor]:
        """The kernels of K' = M K, K'[t] = sum_u M[t, u] K[u], for M of shape (groups, T, T), or its diagonal.

        Only the part of M that the layer absorbs (``absorbs_outputs``) is used.
        """
        if cls.absorbs_outputs == "nothing":
            return dict(kernels)
        role, kernel = list(kernels.items())[-1]
        if cls.absorbs_outputs == "full" and mixing.dim() == 3:
            mixed = torch.einsum("gtu,gu...->gt...", mixing, kernel)
        else:
            scale = mixing if mixing.dim() == 2 else mixing.diagonal(dim1=1, dim2=2)
            scale = scale.reshape(-1, *(1,) * (kernel.dim() - 2))
            mixed = (kernel.flatten(0, 1) * scale).reshape(kernel.shape)
        return {**kernels, role: mixed}

    @classmethod
    def refittable(cls, kernels: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The last roles that can be refitted by linear least squares with the other factors fixed; may be empty.

        A single role is a 1x1 convolution A on the output of the factors before it. Two are a kernel of rank r on
        that output, A C with A a 1x1 convolution of r inputs.
        """
        return ("expand",) if "expand" in kernels else ()

    @classmethod
    @abstractmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Read the ranks off the kernels of the roles."""

    @abstractmethod
    def dense_kernels(self) -> Tensor:
        """Multiply the factors: one dense kernel (groups, T, S, *kernel) per group."""

    def dense_weight(self) -> Tensor:
        """Multiply the factors: the weight that this layer applies, in the layout and dtype of the dense layer."""
        device = next(self.parameters()).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # it would give the product of float32 factors in bfloat16
                return self.dense_weight()
        return join_kernels(self.dense_kernels(), input_first=self.input_first)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Build the dense layer that this one replaces, with the product of the factors as its weight."""
        with torch.device("meta"):
            dense: Any = self.empty_dense().to(next(self.parameters()).dtype).train(self.training)
        self._give_plain_attributes(dense)
        factors = [parameter for name, parameter in self.named_parameters() if not name.endswith("bias")]
        widest: Tensor = max(factors, key=lambda parameter: parameter.numel())
        weight = self.dense_weight().detach().contiguous(memory_format=memory_format_of(widest))
        trained = any(parameter.requires_grad for parameter in factors)
        dense.weight = nn.Parameter(weight, requires_grad=trained)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return cast(nn.Module, dense)

    def _give_plain_attributes(self, dense: nn.Module) -> None:
        """Set on a dense layer the plain values that were set on the one that this layer replaced."""
        for name, value in attributes_of(self):
            if name not in _OF_FACTORIZED and not hasattr(dense, name) and is_plain(value):
                setattr(dense, name, copy.deepcopy(value))

    def empty_dense(self) -> nn.Module:
        """Build a layer of the dense type with the options of this one, with arbitrary weights."""
        if hasattr(self, "nf"):  # the Conv1D of Hugging Face
            return self.dense_type(self.nf, self.nx)
        if hasattr(self, "in_features"):
            return self.dense_type(self.in_features, self.out_features, bias=self.bias is not None)
        names = ["stride", "padding", "dilation", "groups", "padding_mode"]
        names += ["output_padding"] if self.transposed else []
        options = {name: getattr(self, name) for name in names}
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        return self.dense_type(*sizes, bias=self.bias is not None, **options)

    @property
    def weight(self) -> Tensor:
        return self.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        return list(self.children())[-1].bias  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and self._was_read(name, value):
            return  # libraries that wrap and unwrap layers set what they have read
        self._require_no_product(name)
        super().__setattr__(name, value)

    def _was_read(self, name: str, value: Any) -> bool:
        """Whether a value is what ``weight`` or ``bias`` gives already: its bias, or its product."""
        own = getattr(self, name)
        if name == "bias" or not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return own is value
        alike = (own.shape, own.dtype, own.device) == (value.shape, value.dtype, value.device)
        return alike and not own.is_meta and bool(torch.equal(own, value))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._require_no_product(name.removesuffix("_orig"))  # torch.nn.utils.prune registers weight_orig
        super().register_parameter(name, param)

    def _require_no_product(self, name: str) -> None:
        """Refuse to set what is computed from the factors: it would not reach them.

        Raises:
            AttributeError: says where to write instead.
        """
        if name not in ("weight", "bias"):
            return
        kind, (*_, last) = type(self).__name__, dict(self.named_children())
        holds = "that of its last factor"
        if name == "weight":
            holds = "the product of its factors, multiplied at every read"
        raise AttributeError(
            f"{kind}.{name} cannot be set, pruned or fused: it is {holds}. Use the factors in its place "
            f"(layer.{last}.{name}, prune.l1_unstructured(layer.{last}, {name!r}, 0.5), "
            f"fuse_conv_bn_eval(layer.{last}, norm)), or the dense layer that decomp.densify gives"
        )

    def reset_parameters(self) -> None:
        """Initialize every factor anew, as torch initializes a layer of its kind."""
        for factor in self.children():
            if hasattr(factor, "reset_parameters"):
                cast(Any, factor).reset_parameters()

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` calls first.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"torch.jit.script does not take {type(self).__name__}: call torch.jit.trace or torch.export.export "
            "with example inputs, or script what decomp.densify gives"
        )

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        for factor in self.children():
            input = run_factor(factor, input, output_size)
        return input

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"


def run_factor(factor: Any, input: Tensor, output_size: Any) -> Tensor:
    """Run one factor; a transposed one returns ``output_size`` along the axes that it changes."""
    if output_size is None or not getattr(factor, "transposed", False):
        return cast(Tensor, factor(input))
    axes = len(factor.kernel_size)
    changed = [
        (k, s, p) != (1, 1, 0) for k, s, p in zip(factor.kernel_size, factor.stride, factor.padding, strict=True)
    ]
    sizes = zip(changed, output_size[-axes:], input.shape[-axes:], strict=True)
    return cast(Tensor, factor(input, [after if changes else before for changes, after, before in sizes]))


def _fill(child: Any, kernel: Tensor | None, dense: Any, where: str) -> None:
    if kernel is not None:
        _fill_weight(child, kernel, dense, where)
    if getattr(child, "bias", None) is not None:
        bias = dense.bias
        child.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


def _fill_weight(child: Any, kernel: Tensor, dense: Any, where: str) -> None:
    axes = child.weight.dim() + 1
    kernel = kernel[(..., *(None,) * (axes - kernel.dim()))]
    weight = join_kernels(kernel, input_first=is_input_first(child))
    if weight.shape != child.weight.shape:
        raise ValueError(
            f"{where}: the factors have a weight of shape {tuple(weight.shape)}, "
            f"the layer needs {tuple(child.weight.shape)}"
        )
    source = dense.weight
    weight = weight.detach().to(source.device, source.dtype, copy=True)
    weight = weight.contiguous(memory_format=memory_format_of(source))
    child.weight = nn.Parameter(weight, requires_grad=source.requires_grad)
