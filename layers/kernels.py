"""The weight of a layer as one kernel per group, output channels first, whatever layout torch keeps it in."""

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


def group_kernels(dense: nn.Module) -> Tensor:
    """Return the weight of a linear layer or convolution as ``(groups, T, S, *kernel)``.

    ``T`` and ``S`` are the output and input channels of one group. A linear layer is one group without
    spatial axes. Transposed convolutions, which torch keeps as ``(S, T, *kernel)``, are turned around.

    >>> group_kernels(nn.Conv2d(6, 8, 3, groups=2)).shape
    torch.Size([2, 4, 3, 3, 3])
    >>> group_kernels(nn.ConvTranspose1d(6, 8, 5)).shape
    torch.Size([1, 8, 6, 5])
    """
    weight = cast(Tensor, dense.weight)
    groups = cast(int, getattr(dense, "groups", 1))
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    return kernels.transpose(1, 2) if getattr(dense, "transposed", False) else kernels


def join_kernels(kernels: Tensor, *, transposed: bool = False) -> Tensor:
    """Undo :func:`group_kernels`: ``(groups, T, S, *kernel)`` to the layout that torch keeps.

    >>> conv = nn.ConvTranspose2d(6, 8, 3, groups=2)
    >>> torch.equal(join_kernels(group_kernels(conv), transposed=True), conv.weight)
    True
    """
    return (kernels.transpose(1, 2) if transposed else kernels).flatten(0, 1)


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


def spatial_like(dense: ConvNd, inputs: int, outputs: int, *, bias: bool, device: object) -> nn.Module:
    """A convolution with every spatial option of ``dense`` and other channel counts."""
    options: dict[str, object] = {
        "stride": dense.stride,
        "padding": dense.padding,
        "dilation": dense.dilation,
        "groups": dense.groups,
        "padding_mode": dense.padding_mode,
        "bias": bias,
        "device": device,
        "dtype": dense.weight.dtype,
    }
    if dense.transposed:
        options["output_padding"] = dense.output_padding
    build = cast(type[nn.Conv2d], type(dense))
    return build(inputs, outputs, cast(tuple[int, int], dense.kernel_size), **options)  # type: ignore[arg-type]


def memory_format_of(weight: Tensor) -> torch.memory_format:
    """channels_last where the dense weight is kept so; both formats at once (1x1 kernels) count as ordinary."""
    for dimensions, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            weight.dim() == dimensions
            and not weight.is_contiguous()
            and weight.is_contiguous(memory_format=layout)
        ):
            return layout
    return torch.contiguous_format
