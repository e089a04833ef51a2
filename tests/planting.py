"""Models whose layers have known ranks, so that a decomposition at these ranks must change nothing."""

import torch
from torch import nn

RANK = 4


def plant(model):
    """Project the channel modes of every linear layer and convolution on rank 4; in float64 and eval mode."""
    for module in model.double().eval().modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        kernel = module.weight.detach()
        for mode in (mode for mode in (0, 1) if kernel.shape[mode] > RANK):
            basis = torch.linalg.qr(torch.randn(kernel.shape[mode], RANK, dtype=torch.float64)).Q
            kernel.copy_(torch.tensordot(basis @ basis.mT, kernel, ([1], [mode])).movedim(0, mode))
    return model
