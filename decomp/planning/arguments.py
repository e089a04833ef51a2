"""The arguments that calls share: what is decided about, from which data, and what happens afterwards."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

from typing_extensions import TypeAliasType

from decomp._util.arguments import Argument
from decomp.calibration.calibrate import Statistics
from decomp.methods import Method, MethodOptions
from decomp.network.forward import Batch
from decomp.network.selection import Selector
from decomp.planning.cost import Bounds

Data = TypeAliasType("Data", Iterable[Any] | Statistics)
"""Batches, or what :func:`decomp.calibrate` made of them."""
Inputs = TypeAliasType("Inputs", Callable[[Any], Batch])
"""What a model is called with, from a batch of the user's data."""


class Selection(TypedDict, total=False):
    """Which layers a call is about, and from which data."""

    layers: Annotated[
        Selector,
        Argument(
            None, "which layers: a glob on names, an exact type, a predicate (name, module) -> bool, or several."
        ),
    ]
    exclude: Annotated[Selector, Argument((), "which of these stay dense, written likewise.")]
    data: Annotated[
        Data | None,
        Argument(
            None,
            "batches as the model is called with, or what :func:`decomp.calibrate` made of them. The factors "
            "then minimize the error of each layer's output on them, and energy, error and budgets are about "
            "that error.",
        ),
    ]
    inputs: Annotated[
        Inputs | None,
        Argument(
            None,
            "what the model is called with, from a batch of ``data``: ``lambda batch: batch[0]`` where labels "
            "come with it.",
        ),
    ]
    progress: Annotated[bool | None, Argument(None, "show progress bars; by default where there is a terminal.")]


class Scope(Selection, total=False):
    """What a plan is about, and what it may look at."""

    example_inputs: Annotated[
        Batch | None,
        Argument(
            None,
            "a batch as the model is called with, to count MACs at its sizes. Without it they are those of a "
            "batch of ``data``, or else MACs are compared in the limit of large inputs.",
        ),
    ]


class Application(TypedDict, total=False):
    """What happens when a plan is applied."""

    finetune: Annotated[
        bool | Mapping[str, Any],
        Argument(
            False,
            "True, or arguments of :func:`decomp.finetune_layerwise` as a mapping: train the factors layer by "
            "layer on ``data``; the report is the attribute ``decomp_finetuning`` of the result.",
        ),
    ]
    sequential: Annotated[
        bool,
        Argument(
            False,
            "decompose layer after layer, each for the inputs that it gets in the network compressed so far and "
            "for the outputs of the dense one (Zhang et al. 2016, section 3.3); with ``finetune`` it is trained "
            "before the next one is decomposed. Takes a pass over ``data`` per layer, several where it is large.",
        ),
    ]
    inplace: Annotated[
        bool, Argument(False, "change ``model`` itself. Every factor is computed before the first swap.")
    ]


class BudgetArguments(Bounds, total=False):
    """How much of which cost, and how it is spent."""

    methods: Annotated[
        str | Sequence[str | Method],
        Argument(
            "auto",
            'rows of the table of methods to choose among; "auto" are svd and tucker, which know their error at '
            "all "
            "ranks at once.",
        ),
    ]
    objective: Annotated[
        str,
        Argument(
            "auto",
            '"product" of the shares of energy kept (Zhang et al. 2016, section 3.2.3); "sum" of squared '
            'relative errors; "max", the largest relative error of a layer (Liebenwein et al. 2021); "network", '
            "the sum of what the "
            "errors do to the network, known where ``data`` comes from ``calibrate(..., loss=)``. "
            '"auto" is "network" where that is known, else "product".',
        ),
    ]
    multiple_of: Annotated[int, Argument(1, "ranks are multiples of it, or full; 8 suits GPUs.")]
    weights: Annotated[
        Mapping[str, float] | None,
        Argument(
            None,
            "how much the error of a layer counts, by name; 1 where it says nothing. See "
            ":func:`decomp.sensitivity`.",
        ),
    ]


class CallArguments(Scope, Application, total=False):
    """The arguments of a call that plans by rank rules and applies: ``decomp.tucker`` and the others."""


class PlanArguments(MethodOptions, BudgetArguments, Scope, total=False):
    """The arguments of :func:`decomp.plan`."""


class CompressArguments(BudgetArguments, Selection, Application, total=False):
    """The arguments of :func:`decomp.compress`."""
