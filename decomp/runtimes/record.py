"""The record of a runtime: its name, its precision, its threads, and the function that prepares a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from decomp.runtimes.int8_ranges import with_like_ranges

Prepare = Callable[[nn.Module, Any, Sequence[Any], int], Callable[[Any], Any]]


@dataclass(frozen=True)
class Runtime:
    """A runtime: something that makes a callable of a model.

    A record of your own goes wherever the name of a built-in one does: TensorRT, or a phone that runs the model
    and answers over the network.

    Args:
        name: what tables call it.
        prepare: a function of (model, example_inputs, data, threads) that returns a callable of a batch, which has
            the sizes of ``example_inputs`` but for the first axis. It must not change the model, which is in eval
            mode. ``data`` is a list of batches for quantization, empty where none were given. If the callable has
            an attribute ``bytes``, tables show it as the size of the model.
        precision: "f32", "bf16" or "int8", for tables.
        threads: how many threads it runs with; by default as many as torch has.
        needs_data: whether ``prepare`` needs ``data``. The channels between the factors of a layer then come with
            like ranges.

    >>> plain = Runtime("plain", lambda model, example_inputs, data, threads: model)
    >>> ready(plain, nn.Linear(4, 2), torch.zeros(1, 4))(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    name: str
    prepare: Prepare
    precision: str = "f32"
    threads: int | None = None
    needs_data: bool = False


def find(runtime: "str | Runtime") -> Runtime:
    """Return a runtime by its name; a record is returned as it is.

    Raises:
        ValueError: no built-in runtime has this name.
        TypeError: it is neither a name nor a record.
    """
    if isinstance(runtime, Runtime):
        return runtime
    from decomp.runtimes import RUNTIMES  # late: the table is made of what this module defines

    if not isinstance(runtime, str):
        raise TypeError(f"runtime={runtime!r}: write a name, or a decomp.runtimes.Runtime")
    if runtime not in RUNTIMES:
        raise ValueError(
            f"runtime={runtime!r} is unknown: write one of {', '.join(RUNTIMES)}, or a Runtime record"
        )
    return RUNTIMES[runtime]


def ready(
    runtime: "str | Runtime", model: nn.Module, example_inputs: Any, data: Sequence[Any] = ()
) -> Callable[[Any], Any]:
    """Return a callable that runs ``model`` in a runtime, on batches with the sizes of ``example_inputs``.

    Args:
        runtime: its name, or a record.
        model: any model; it is not changed, and later changes of its weights do not count.
        example_inputs: a batch as the model is called with.
        data: batches that a quantizing runtime chooses its ranges on.

    Raises:
        ValueError: the runtime is unknown, or quantizes and there are no ``data``.
        ImportError: the package of the runtime is not installed.

    >>> run = ready("eager", nn.Linear(4, 2), torch.zeros(1, 4))
    >>> run(torch.zeros(1, 4)).shape
    torch.Size([1, 2])
    """
    found = find(runtime)
    if found.needs_data and not len(data):
        raise ValueError(
            f"runtime={found.name!r} quantizes the model, and chooses the ranges of its activations on data: "
            "give data=, some batches as the model is called with"
        )
    if found.needs_data:
        model = with_like_ranges(model, data)
    return found.prepare(model, example_inputs, data, found.threads or torch.get_num_threads())


class InRuntime(nn.Module):
    """A model whose ``forward`` runs in a runtime, for functions that score models.

    The parameters are those of the model as it was given; only calls run in the runtime.

    Args:
        model: any model.
        runtime: the name of a runtime, or a record.
        example_inputs: a batch as the model is called with; others may differ from it in the first axis only.
        data: batches for a quantizing runtime.

    >>> module = InRuntime(nn.Linear(4, 2), "eager", torch.zeros(1, 4))
    >>> module(torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, model: nn.Module, runtime: "str | Runtime", example_inputs: Any, data: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.run = ready(runtime, model, example_inputs, data)

    def forward(self, *positional: Any, **keywords: Any) -> Any:
        if positional and keywords:
            raise TypeError("call it with positional arguments or with keywords, as example_inputs were given")
        return self.run(keywords or (positional[0] if len(positional) == 1 else positional))
