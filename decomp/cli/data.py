"""Data of the command line: a folder of tensors or of images, or an iterable of Python."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from decomp._util.optional import needing
from decomp.cli.values import InputSpec, is_reference, resolve

TENSORS = (".npy", ".pt", ".safetensors")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class TensorFolder:
    """Batches of a folder, one per file, in the order of their names, numbers as numbers.

    A ``.npy`` file is one tensor. A ``.pt`` file holds a tensor, or a tuple, list or dict of tensors, and is read
    with ``weights_only=True``. A ``.safetensors`` file with one entry is one tensor, with several it is a dict.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Any]:
        return map(_read, self._paths)


class ImageFolder:
    """Batches of the images of a folder and its subfolders: resized, cropped in the middle, normalized.

    Args:
        paths: of the images.
        size: (channels, height, width) that the model takes; channels are 1 or 3.
        batch_size: images in a batch.
        mean: per channel, of values in [0, 1].
        std: per channel.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: tuple[int, int, int],
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._paths, self._size, self._batch_size = paths, size, batch_size
        channels = size[0]
        for option, values in (("--mean", mean), ("--std", std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{option}: {len(values)} numbers for {channels} channels; give {channels}, or one"
                )
        self._mean, self._std = (torch.tensor(list(each)).view(-1, 1, 1) for each in (mean, std))

    def __len__(self) -> int:
        return -(-len(self._paths) // self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._paths), self._batch_size):
            yield torch.stack([self._image(path) for path in self._paths[start : start + self._batch_size]])

    def _image(self, path: Path) -> Tensor:
        with needing("PIL", "images need Pillow: pip install pillow"):
            from PIL import Image, ImageOps, UnidentifiedImageError
        channels, height, width = self._size
        try:
            with Image.open(path) as opened:
                # fit() resizes to cover the size, and crops what is left over at both sides alike.
                image = ImageOps.fit(opened.convert("RGB" if channels == 3 else "L"), (width, height))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"--data {str(path)!r} is no image that can be read: {error}") from None
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(height, width, channels)
        return (pixels.permute(2, 0, 1) / 255 - self._mean) / self._std


def open_data(
    text: str,
    specs: Sequence[InputSpec],
    *,
    option: str = "--data",
    batch_size: int = 32,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Iterable[Any]:
    """Open the data that an option names.

    Args:
        text: a folder, or "package.module:loader", an iterable or a function that returns one.
        specs: the inputs of the model, for the size of images.
        option: named in errors.
        batch_size: images in a batch.
        mean: of the channels of images.
        std: of the channels of images.

    Raises:
        ValueError: there is nothing there, or the folder holds neither tensors nor images.
        TypeError: the object is no iterable.
    """
    if is_reference(text):
        found = resolve(text, option)
        loader = found() if callable(found) and not isinstance(found, Iterable) else found
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"{option} {text!r} is a {type(loader).__name__}: an iterable of batches is needed, or a function "
                "that returns one"
            )
        return loader
    folder = Path(text)
    if not folder.is_dir():
        raise ValueError(f'{option} {text!r}: there is no such folder; write one, or "package.module:loader"')
    tensors = sorted((path for path in folder.iterdir() if path.suffix in TENSORS), key=_natural)
    if tensors:
        return TensorFolder(tensors)
    images = sorted((path for path in folder.rglob("*") if path.suffix.lower() in IMAGES), key=_natural)
    if not images:
        raise ValueError(
            f"{option} {text!r} holds neither tensors ({', '.join(TENSORS)}) nor images ({', '.join(IMAGES)})"
        )
    return ImageFolder(images, _image_size(specs), batch_size, mean, std)


def chooser(text: str) -> Callable[[Any], Any]:
    """What of a batch the model is called with: a position, a key, or "package.module:function".

    Raises:
        ValueError: the function cannot be imported.

    >>> chooser("0")(("images", "labels")), chooser("image")({"image": 1, "label": 2})
    ('images', 1)
    """
    if is_reference(text):
        function = resolve(text, "--batch-inputs")
        if not callable(function):
            raise ValueError(f"--batch-inputs {text!r} is no function")
        return function  # type: ignore[no-any-return]
    key: Any = int(text) if re.fullmatch(r"-?\d+", text) else text

    def chosen(batch: Any) -> Any:
        try:
            return batch[key]
        except (IndexError, KeyError, TypeError):
            raise ValueError(f"--batch-inputs {text!r}: a batch, a {type(batch).__name__}, has none") from None

    return chosen


def _image_size(specs: Sequence[InputSpec]) -> tuple[int, int, int]:
    if len(specs) != 1 or len(specs[0].shape) != 4 or specs[0].shape[1] not in (1, 3):
        raise ValueError(
            "a folder of images needs the size that the model takes, with 1 or 3 channels: --input 1x3x224x224 "
            "for example"
        )
    _, channels, height, width = specs[0].shape
    return channels, height, width


def _natural(path: Path) -> list[Any]:
    """A key by which 2 comes before 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", str(path))
    ]


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        entries = load_file(path)
    except UnpicklingError:
        raise ValueError(
            f"--data {str(path)!r} holds more than tensors, and reading it could run code: save tensors, or "
            "tuples, lists or dicts of tensors"
        ) from None
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"--data {str(path)!r} is no batch of tensors: {error}") from None
    return next(iter(entries.values())) if len(entries) == 1 else entries
