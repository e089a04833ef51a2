"""A small residual network and the real handwritten digits that come with scikit-learn."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from decomp._util.optional import needing
from decomp._util.progress import bar

Batch = tuple[Tensor, Tensor]
BATCH_SIZE = 64
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1.0


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016).

    Args:
        inputs: input channels.
        outputs: output channels.
        stride: of the first convolution and of the shortcut.

    >>> Block(4, 8, stride=2)(torch.zeros(1, 4, 8, 8)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network for 8 x 8 grey images and ten classes (He et al. 2016).

    Args:
        width: channels of the first block; the next two have 2 and 4 times as many.

    >>> DigitNet(width=8)(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """1,797 scanned digits, every fifth held out: batches (images, labels) to train on, and one to test with."""

    train: list[Batch]
    test: Batch

    @property
    def images(self) -> list[Tensor]:
        """The training images without their labels."""
        return [images for images, _ in self.train]

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of the held-out digits that ``model`` reads correctly; it is left in eval mode.

        Args:
            model: takes a batch of images and returns a score per class.
        """
        model.eval()
        with torch.no_grad():
            return float((model(self.test[0]).argmax(1) == self.test[1]).float().mean())


def load_digits(seed: int = 0) -> Digits:
    """Load the digits that come with scikit-learn, in shuffled batches of 64.

    Args:
        seed: of the shuffling, which also decides which digits are held out.

    Raises:
        ImportError: scikit-learn is not installed.

    >>> digits = load_digits()
    >>> sum(len(images) for images in digits.images), len(digits.test[0])
    (1437, 360)
    """
    with needing("sklearn", "the digits come with scikit-learn: pip install 'decomp[demo]'"):
        from sklearn.datasets import load_digits as load

    data = load()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, rest = order[::5], order[torch.arange(len(order)) % 5 != 0]
    train = [(images[part], labels[part]) for part in torch.split(rest, BATCH_SIZE)]
    return Digits(train, (images[test], labels[test]))


def train(digits: Digits, seed: int = 0, epochs: int = 40, progress: bool | None = None) -> nn.Module:
    """Train a :class:`DigitNet` from scratch and return it in eval mode; two cores take about 10 seconds.

    AdamW with a one-cycle learning rate; every batch is shifted by up to a pixel.

    Args:
        digits: what it learns from.
        seed: of the weights and of the shifts; torch's global seed is set to it.
        epochs: passes over the training batches.
        progress: show a progress bar; by default where there is a terminal.

    >>> model = train(load_digits(), epochs=1, progress=False)
    >>> type(model).__name__, model.training
    ('DigitNet', False)
    """
    torch.manual_seed(seed)
    model = DigitNet()
    steps = epochs * len(digits.train)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with bar(progress, "train", total=steps) as steps_bar:
        for _ in range(epochs):
            for images, labels in digits.train:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(_shifted(images)), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                steps_bar.update()
    return model.eval()


def _shifted(images: Tensor) -> Tensor:
    """Move a batch by up to one pixel in each direction."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    padded = functional.pad(images, (1, 1, 1, 1))
    return padded[:, :, 1 + down : 9 + down, 1 + right : 9 + right]
