"""The weight of a layer as one kernel per group, output channels first, independent of its layout in torch."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

ConvNd: TypeAlias = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
CONVOLUTIONS: tuple[type[ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS: tuple[type[ConvNd], ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
HUGGING_FACE_CONV1D = "transformers.pytorch_utils.Conv1D"
_COMPUTING = ("forward", "_conv_forward", "_output_padding", "__call__", "__getattr__", "__getattribute__")


def group_kernels(dense: nn.Module) -> Tensor:
    """Return the weight of a linear layer or convolution as ``(groups, T, S, *kernel)``.

    ``T`` and ``S`` are the output and input channels of one group. A linear layer is one group without
    spatial axes. Weights stored input first, ``(S, T, *kernel)``, are transposed.

    >>> group_kernels(nn.Conv2d(6, 8, 3, groups=2)).shape
    torch.Size([2, 4, 3, 3, 3])
    >>> group_kernels(nn.ConvTranspose1d(6, 8, 5)).shape
    torch.Size([1, 8, 6, 5])
    """
    weight = cast(Tensor, dense.weight)
    groups = cast(int, getattr(dense, "groups", 1))
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    return kernels.transpose(1, 2) if is_input_first(dense) else kernels


def join_kernels(kernels: Tensor, *, input_first: bool = False) -> Tensor:
    """Undo :func:`group_kernels`: ``(groups, T, S, *kernel)`` to the layout of torch.

    >>> conv = nn.ConvTranspose2d(6, 8, 3, groups=2)
    >>> torch.equal(join_kernels(group_kernels(conv), input_first=True), conv.weight)
    True
    """
    return (kernels.transpose(1, 2) if input_first else kernels).flatten(0, 1)


def is_input_first(dense: nn.Module) -> bool:
    """Whether a layer stores its weight as (S, T, ...): transposed convolutions, embeddings, Conv1D of GPT-2.

    An embedding is the matrix (T x S) that multiplies one-hot vectors; its S is the number of entries.
    """
    is_transposed = isinstance(dense, nn.Embedding) or qualified_name(type(dense)) == HUGGING_FACE_CONV1D
    return is_transposed or bool(getattr(dense, "transposed", False))


def kind_of(dense: nn.Module) -> type[nn.Module]:
    """The type of torch whose computation a layer performs: its own, but for subclasses of convolutions.

    A subclass that overrides neither ``forward`` nor ``_conv_forward`` computes what torch's convolution does, and
    differs in its constructor alone: Conv3DSimple of torchvision is an ``nn.Conv3d``.

    >>> class Conv3x3(nn.Conv2d):
    ...     def __init__(self, inputs, outputs):
    ...         super().__init__(inputs, outputs, 3)
    >>> kind_of(Conv3x3(4, 8)), kind_of(nn.Linear(4, 8))
    (<class 'torch.nn.modules.conv.Conv2d'>, <class 'torch.nn.modules.linear.Linear'>)
    """
    kind = type(dense)
    for base in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        if kind is not base and issubclass(kind, base):
            inherited = all(getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING)
            return base if inherited else kind
    return kind


def qualified_name(kind: type) -> str:
    """The full name of a type, to recognize it without importing its library."""
    return f"{kind.__module__}.{kind.__qualname__}"


def pointwise_like(dense: ConvNd, inputs: int, outputs: int, *, bias: bool, device: object) -> nn.Module:
    """A 1x1 convolution (stride 1, no padding) with the groups, axes and dtype of ``dense``."""
    return CONVOLUTIONS[len(dense.kernel_size) - 1](
        inputs,
        outputs,
        1,
        groups=dense.groups,
        bias=bias,
        device=cast(torch.device, device),
        dtype=dense.weight.dtype,
    )


def spatial_like(
    dense: ConvNd,
    inputs: int,
    outputs: int,
    *,
    bias: bool,
    device: object,
    groups: int | None = None,
    axes: tuple[int, ...] | None = None,
) -> nn.Module:
    """A convolution with the spatial options of ``dense`` and other channel counts.

    ``groups`` are those of ``dense`` if not given. With ``axes`` the convolution runs along these spatial axes
    only, with their length, stride, padding and dilation; the others have length 1 and default options.
    """

    def along(values: Sequence[int] | str, neutral: int) -> object:
        if axes is None or isinstance(values, str):
            return values
        return tuple(value if axis in axes else neutral for axis, value in enumerate(values))

    options: dict[str, object] = {
        "stride": along(dense.stride, 1),
        "padding": along(dense.padding, 0),
        "dilation": along(dense.dilation, 1),
        "groups": dense.groups if groups is None else groups,
        "padding_mode": dense.padding_mode,
        "bias": bias,
        "device": device,
        "dtype": dense.weight.dtype,
    }
    if dense.transposed:
        options["output_padding"] = along(dense.output_padding, 0)
    build = cast(type[nn.Conv2d], kind_of(dense))
    return build(inputs, outputs, cast(tuple[int, int], along(dense.kernel_size, 1)), **options)  # type: ignore[arg-type]


def spatial_steps(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """The spatial axes of each step in a chain of convolutions along single axes.

    Axes of length 1 need no convolution of their own and are part of the first step.

    >>> spatial_steps((3, 3)), spatial_steps((1, 3, 5)), spatial_steps((1,))
    ([(0,), (1,)], [(0, 1), (2,)], [(0,)])
    """
    long = [axis for axis, length in enumerate(kernel_size) if length > 1] or [0]
    short = [axis for axis, length in enumerate(kernel_size) if length == 1 and axis not in long]
    return [tuple(sorted([long[0], *short])), *((axis,) for axis in long[1:])]


def step_sizes(kernel_size: Sequence[int], steps: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The kernel size of the convolution of each step: 1 along the axes of the others.

    >>> step_sizes((1, 3, 5), spatial_steps((1, 3, 5)))
    [(1, 3, 1), (1, 1, 5)]
    """
    return [tuple(k if axis in step else 1 for axis, k in enumerate(kernel_size)) for step in steps]


def step_lengths(kernel_size: Sequence[int]) -> list[int]:
    """The number of kernel elements along the axis of each step.

    >>> step_lengths((1, 3, 5))
    [3, 5]
    """
    return [max(kernel_size[axis] for axis in step) for step in spatial_steps(kernel_size)]


def memory_format_of(weight: Tensor) -> torch.memory_format:
    """channels_last if the dense weight is stored so; 1x1 kernels, which are both, count as contiguous."""
    for dimensions, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            weight.dim() == dimensions
            and not weight.is_contiguous()
            and weight.is_contiguous(memory_format=layout)
        ):
            return layout
    return torch.contiguous_format


def recurrent_matrices(dense: nn.RNNBase) -> dict[str, Tensor]:
    """The weights of an LSTM, GRU or RNN as batches of matrices.

    ``input`` (1, D G H, S) are the input weights of the first layer, ``upper`` (L - 1, D G H, D P) those of the
    layers above it, if there are any, the directions one below the other; ``recurrent`` (L D, G H, P) are the
    recurrent weights. D is the number of directions, G of gates, L of layers, H and P the sizes of the cell and of
    the output.

    >>> matrices = recurrent_matrices(nn.LSTM(5, 3, num_layers=3, bidirectional=True))
    >>> {role: tuple(each.shape) for role, each in matrices.items()}
    {'input': (1, 24, 5), 'recurrent': (6, 12, 3), 'upper': (2, 24, 6)}
    """
    values = dict(dense.named_parameters())
    inputs = [_stacked(values, "weight_ih", place) for place in range(dense.num_layers)]
    recurrent = torch.stack([value for name, value in values.items() if name.startswith("weight_hh")])
    upper = {"upper": torch.stack(inputs[1:])} if inputs[1:] else {}
    return {"input": inputs[0][None], "recurrent": recurrent, **upper}


def weight_matrix(parameters: Mapping[str, Tensor], layers: int) -> Tensor:
    """All weights of a recurrent layer but its projections, side by side: (D G H, S + (L - 1) D P + L P)."""
    kinds = ("weight_ih", "weight_hh")
    return torch.cat([_stacked(parameters, kind, place) for place in range(layers) for kind in kinds], 1)


def _stacked(parameters: Mapping[str, Tensor], kind: str, place: int) -> Tensor:
    names = (f"{kind}_l{place}{suffix}" for suffix in ("", "_reverse"))
    return torch.cat([parameters[name] for name in names if name in parameters])


def weight_of(dense: nn.Module) -> Tensor:
    """The weight of a layer in the layout of torch; of a recurrent layer :func:`weight_matrix`."""
    if isinstance(dense, nn.RNNBase):
        return weight_matrix(dict(dense.named_parameters()), dense.num_layers)
    return cast(Tensor, dense.weight)


def shape_of(module: object) -> tuple[int, ...]:
    """The shape of :func:`weight_of`; empty for a module without a weight."""
    has_weight = isinstance(module, nn.RNNBase) or isinstance(getattr(module, "weight", None), Tensor)
    return tuple(weight_of(module).shape) if has_weight else ()  # type: ignore[arg-type]
