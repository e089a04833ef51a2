"""Network shapes of the literature, for benchmarks and tests: AlexNet, VGG-16, ResNet-18 and ResNet-50."""

import torch
from torch import Tensor, nn


def alexnet() -> nn.Sequential:
    """AlexNet as Caffe trained it: grouped, for 227 x 227 images."""

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        padding = 0 if kernel == 11 else kernel // 2
        return [nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups), nn.ReLU()]

    return nn.Sequential(
        *(*conv(3, 96, 11, 4), nn.MaxPool2d(3, 2), *conv(96, 256, 5, 1, 2), nn.MaxPool2d(3, 2)),
        *(*conv(256, 384, 3), *conv(384, 384, 3, 1, 2), *conv(384, 256, 3, 1, 2), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(9216, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)),
    )


def vgg16() -> nn.Sequential:
    """VGG-16 without BatchNorm, for 224 x 224 images."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    head = (nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))
    return nn.Sequential(*layers, nn.Flatten(), *head)


class Residual(nn.Module):
    """A residual block: ``body`` plus a shortcut, then ReLU."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.downsample(x))
        return y


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(
        *(conv(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(conv(width, width, 3), nn.BatchNorm2d(width)),
    )
    return Residual(body, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(
        *(conv(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(conv(width, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)),
    )
    return Residual(body, inputs, 4 * width, stride)


def resnet18() -> nn.Sequential:
    """ResNet-18 for 224 x 224 images."""
    return _resnet(basic_block, 1, (2, 2, 2, 2))


def resnet50() -> nn.Sequential:
    """ResNet-50 with the stride in the 3x3 convolutions (v1.5), for 224 x 224 images."""
    return _resnet(bottleneck, 4, (3, 4, 6, 3))


def _resnet(block: object, expansion: int, depths: tuple[int, ...]) -> nn.Sequential:
    stem = (conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    model = nn.Sequential(*stem)
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        blocks = []
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(block(inputs, width, stride))  # type: ignore[operator]
            inputs = width * expansion
        model.append(nn.Sequential(*blocks))
    return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)])


def plant_spectra(model: nn.Module, seed: int = 0, decay: float = 1.0) -> nn.Module:
    """Give every weight matrix and kernel singular values i^-decay, as trained networks have; random bases.

    The kernel is a Tucker tensor: bases of both channel modes, and a core whose energy falls in both.
    Weights drawn at random are noise to vbmf, which rightly leaves them dense.
    """
    generator = torch.Generator().manual_seed(seed)

    def basis(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            weight = module.weight
            outputs, inputs = weight.shape[:2]
            core = torch.randn(outputs, inputs, *weight.shape[2:], generator=generator)
            rows, columns = (torch.arange(1, size + 1.0) for size in (outputs, inputs))
            fall = torch.maximum(rows[:, None], columns[None]) ** -decay
            core *= fall.reshape(outputs, inputs, *(1,) * (weight.dim() - 2))
            planted = torch.einsum("ta,ab...,sb->ts...", basis(outputs), core, basis(inputs))
            weight.copy_(planted * (weight.norm() / planted.norm()))
    return model
