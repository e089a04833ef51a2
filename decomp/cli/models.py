"""Models of the command line: a Python factory with a file of weights, or a folder of Hugging Face."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from decomp._util.naming import some
from decomp._util.optional import needing
from decomp.cli.values import is_reference, resolve
from decomp.files.checkpoints import class_of
from decomp.files.load import load
from decomp.planning.plan import PLAN, Plan

NEEDS_TRANSFORMERS = "a folder of Hugging Face needs transformers: pip install transformers"


@dataclass(frozen=True)
class Source:
    """Where a dense model comes from.

    Args:
        text: "package.module:factory", or the path of a folder.
        weights: a file with the weights of the factory's model.
        arguments: keyword arguments of the factory.
        device: of the model.
    """

    text: str
    weights: Path | None = None
    arguments: Mapping[str, Any] | None = None
    device: str = "cpu"

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of Hugging Face."""
        return not is_reference(self.text)

    @property
    def constructor(self) -> str:
        """The factory as the file of a model names it."""
        return self.text.replace(":", ".")

    def dense(self) -> nn.Module:
        """Make the dense model with its weights, in eval mode.

        Raises:
            ValueError: the factory or the folder is not there, or the weights are not of this model.
            TypeError: the factory returns no module.
        """
        if self.is_folder:
            if self.weights is not None or self.arguments is not None:
                raise ValueError("--weights and --arguments belong to a factory: a folder holds its weights")
            return _from_folder(Path(self.text)).to(self.device)
        model = self._made()
        if self.weights is not None:
            _fill(model, self.weights)
        return model.to(self.device).eval()

    def compressed(self, path: Path) -> nn.Module:
        """Load what ``decomp compress`` wrote for this model: a file, or a folder of Hugging Face.

        Raises:
            ValueError: it is damaged, or was made of another model.
        """
        if path.is_dir():
            small = _from_folder(path)
            if not isinstance(getattr(small, PLAN, None), Plan):
                raise ValueError(f"{str(path)!r} is no compressed model: decomp compress writes one")
            return small.to(self.device)
        model = _from_folder(Path(self.text)) if self.is_folder else self._made()
        return load(path, model).to(self.device).eval()

    def _made(self) -> nn.Module:
        factory = resolve(self.text, "MODEL")
        if isinstance(factory, nn.Module):
            if self.arguments is not None:
                raise ValueError(f"--arguments: {self.text!r} is a module already, nothing is called with them")
            return factory
        if not callable(factory):
            raise TypeError(f"MODEL {self.text!r} is a {type(factory).__name__}: a function or a class is needed")
        model = factory(**(self.arguments or {}))
        if not isinstance(model, nn.Module):
            raise TypeError(f"MODEL {self.text!r} returned a {type(model).__name__}: a torch.nn.Module is needed")
        return model


def read_arguments(text: str) -> dict[str, Any]:
    """Read the keyword arguments of a factory from JSON.

    Raises:
        ValueError: the text is no JSON object.

    >>> read_arguments('{"classes": 10}')
    {'classes': 10}
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{text!r}: write an object, '{{\"classes\": 10}}' for example")
    return found


def _from_folder(folder: Path) -> nn.Module:
    """Load a model of transformers in the class that its ``config.json`` names."""
    if not folder.is_dir():
        raise ValueError(
            f'MODEL {str(folder)!r}: there is no such folder; write "package.module:factory", or the folder of a '
            "model of Hugging Face"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL {str(folder)!r} has no config.json: it is no folder of a model of Hugging Face")
    with needing("transformers", NEEDS_TRANSFORMERS):
        from decomp.huggingface import from_pretrained, is_compressed
    if is_compressed(folder):
        return cast(nn.Module, from_pretrained(folder))
    kind, _ = class_of(folder)
    model: nn.Module = kind.from_pretrained(folder)
    return model


def _fill(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into a model.

    Raises:
        ValueError: the file is damaged, or its names or shapes are not those of the model.
    """
    if not path.is_file():
        raise ValueError(f"--weights {str(path)!r}: there is no such file")
    state = _state(path)
    try:
        wrong = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # other shapes
        raise ValueError(f"--weights {str(path)!r} is of another model: {error}") from None
    tied = _tied_names(model)
    missing = [name for name in wrong.missing_keys if not tied.get(name, set()) & state.keys()]
    if missing or wrong.unexpected_keys:
        texts = {"it lacks": missing, "the model does not have": wrong.unexpected_keys}
        listed = "; ".join(f"{what} {some(names)}" for what, names in texts.items() if names)
        raise ValueError(f"--weights {str(path)!r} is of another model: {listed}")


def _tied_names(model: nn.Module) -> dict[str, set[str]]:
    """All names of each tensor that has several: files of safetensors hold one of them."""
    groups: dict[int, set[str]] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        groups.setdefault(id(tensor), set()).add(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def _state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"--weights {str(path)!r} is damaged: {error}") from None
    except Exception as error:  # a pickle that holds more than tensors
        raise ValueError(
            f"--weights {str(path)!r} holds more than tensors, and reading it could run code: write "
            f"safetensors.torch.save_model(model, path) where it was made ({type(error).__name__})"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"--weights {str(path)!r} is no state dict: save model.state_dict() alone, best with "
            "safetensors.torch.save_model(model, path)"
        )
    return dict(state)
