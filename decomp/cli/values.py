"""Values of options: ranks, budgets, sizes of inputs, and names of Python objects."""

import ast
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decomp import ranks
from decomp._util.naming import some

RULES: dict[str, Callable[..., ranks.Rule]] = {
    "energy": ranks.energy,
    "error": ranks.error,
    "gavish_donoho": ranks.gavish_donoho,
    "macs": ranks.macs,
    "mdl": ranks.mdl,
    "params": ranks.params,
    "stable_rank": ranks.stable_rank,
    "vbmf": ranks.vbmf,
}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")
SIZES = re.compile(r"\d+(x\d+)*")


def rank_rule(text: str) -> ranks.Rule:
    """A rule as it is written in Python.

    Raises:
        ValueError: it is none.

    >>> rank_rule("energy(0.9)"), rank_rule("vbmf")
    (energy(share=0.9, nuclear=False), vbmf(weaken=1.0))
    """
    try:
        tree = ast.parse(text.strip().removeprefix("decomp.").removeprefix("ranks."), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        if not isinstance(call.func, ast.Name) or call.func.id not in RULES:
            raise ValueError(text)
        positional = [ast.literal_eval(each) for each in call.args]
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"{text!r} is no rank rule: write one of {', '.join(RULES)}, with its numbers in brackets, "
            '"energy(0.9)" for example'
        ) from None
    try:
        return RULES[call.func.id](*positional, **named)
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}") from None


def rank_spec(text: str) -> Any:
    """Fixed ranks, "16" or "32,16", or a rule.

    >>> rank_spec("16"), rank_spec("32,16")
    (16, (32, 16))
    """
    numbers = [part.strip() for part in text.strip("()").split(",")]
    if all(part.isdecimal() for part in numbers):
        values = tuple(map(int, numbers))
        return values if len(values) > 1 else values[0]
    return rank_rule(text)


def rank_request(texts: Sequence[str]) -> Any:
    """The value of ``ranks=`` from one spec, or from several "GLOB=SPEC".

    Raises:
        ValueError: one is not understood, or several lack their glob.

    >>> rank_request(["layer3.*=32,16", "fc=8"])
    {'layer3.*': (32, 16), 'fc': 8}
    """
    pairs = [re.fullmatch(r"([^=(]+)=(.+)", text) for text in texts]
    if len(texts) == 1 and pairs[0] is None:
        return rank_spec(texts[0])
    for text, pair in zip(texts, pairs, strict=True):
        if pair is None:
            raise ValueError(
                f'--ranks {text!r}: one of several must be "GLOB=RANKS", "layer3.*=32,16" for example'
            )
    return {pair[1]: rank_spec(pair[2]) for pair in pairs if pair is not None}


def budget(text: str) -> float:
    """A share, "0.5" or "50%", or an absolute number.

    >>> budget("0.5"), budget("50%"), budget("1000000")
    (0.5, 0.5, 1000000)
    """
    text = text.strip().replace("_", "")
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no budget: write a share, 0.5 or 50%, or an absolute number") from None


@dataclass(frozen=True)
class InputSpec:
    """Sizes of one argument of the model: "1x3x224x224", "1x128:int64" or "input_ids=1x128:int64".

    Args:
        name: of a keyword argument; empty for a positional one.
        shape: sizes, the batch first.
        dtype: of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def parse(cls, text: str) -> "InputSpec":
        """Read a spec.

        Raises:
            ValueError: it is none.

        >>> InputSpec.parse("input_ids=1x128:int64").shape
        (1, 128)
        """
        name, _, rest = text.rpartition("=")
        sizes, _, dtype = rest.partition(":")
        dtype = dtype or "float32"
        if not SIZES.fullmatch(sizes) or dtype not in DTYPES or (name and not name.isidentifier()):
            raise ValueError(
                f'{text!r} is no input: write sizes and, where it is not float32, a type, "1x3x224x224", '
                f'"1x128:int64" or "input_ids=1x128:int64"; types are {", ".join(DTYPES)}'
            )
        return cls(name, tuple(map(int, sizes.split("x"))), getattr(torch, dtype))

    def tensor(self, seed: int = 0) -> Tensor:
        """Random values: normal ones, and 0 and 1 for integers, which every vocabulary has.

        >>> InputSpec.parse("2x3").tensor().shape
        torch.Size([2, 3])
        """
        generator = torch.Generator().manual_seed(seed)
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        if self.dtype is torch.bool:
            return torch.ones(self.shape, dtype=torch.bool)
        return torch.randint(0, 2, self.shape, generator=generator, dtype=self.dtype)


def example(specs: Sequence[InputSpec]) -> Any:
    """A batch of these inputs: a tensor, several positional ones, or keywords.

    Raises:
        ValueError: some have names and some have none.
    """
    named = [spec for spec in specs if spec.name]
    if named and len(named) < len(specs):
        raise ValueError("--input: give all of them names, or none")
    tensors = [spec.tensor() for spec in specs]
    if named:
        return {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def is_reference(text: str) -> bool:
    """Whether a text names a Python object, "package.module:name", and no file of that name exists."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text)) and not Path(text).exists()


def resolve(reference: str, option: str) -> Any:
    """Import the object "package.module:name"; modules are also searched for in the working directory.

    Raises:
        ValueError: there is none; the message says whether the module or the name is missing.
    """
    if not is_reference(reference):
        raise ValueError(f'{option} {reference!r}: write "package.module:name"')
    module_name, _, path = reference.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a package that the module itself needs
        raise ValueError(
            f"{option} {reference!r}: there is no module {error.name!r} in the working directory, and none is "
            "installed"
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            raise ValueError(f"{option} {reference!r}: {module_name} has no {part!r}; it has {some(names)}")
        found = getattr(found, part)
    return found
