"""Arguments that the public calls share: selection of layers, data, budgets, application of plans."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

from typing_extensions import TypeAliasType

from decomp._util.arguments import Argument
from decomp.calibration.calibrate import Statistics
from decomp.methods import Method, MethodOptions
from decomp.network.forward import Batch
from decomp.network.selection import Selector
from decomp.planning.budget import MIN_GAIN
from decomp.planning.cost import Bounds
from decomp.runtimes import Runtime

Data = TypeAliasType("Data", Iterable[Any] | Statistics)
"""Batches, or the statistics of them from :func:`decomp.calibrate`."""
Inputs = TypeAliasType("Inputs", Callable[[Any], Batch])
"""A function that returns the arguments of the model for a batch of the user's data."""


class Selection(TypedDict, total=False):
    """Which layers are decomposed, and with which data."""

    layers: Annotated[
        Selector,
        Argument(
            None, "which layers: a glob on names, an exact type, a predicate (name, module) -> bool, or several."
        ),
    ]
    exclude: Annotated[Selector, Argument((), "which of these stay dense, in the same forms.")]
    data: Annotated[
        Data | None,
        Argument(
            None,
            "batches as the model is called with, or the result of :func:`decomp.calibrate`. The factors then "
            "minimize the error of each layer's output on them, and the rules energy and error and budgets use "
            "that error.",
        ),
    ]
    inputs: Annotated[
        Inputs | None,
        Argument(
            None,
            "returns the arguments of the model for a batch of ``data``: ``lambda batch: batch[0]`` for "
            "(input, label) pairs.",
        ),
    ]
    progress: Annotated[bool | None, Argument(None, "show progress bars; by default where there is a terminal.")]


class Scope(Selection, total=False):
    """The selection of layers and data, and an example for the sizes of inputs."""

    example_inputs: Annotated[
        Batch | None,
        Argument(
            None,
            "a batch as the model is called with, whose sizes determine the MACs. By default a batch of ``data``; "
            "without both, MACs are shares in the limit of large inputs.",
        ),
    ]


class Application(TypedDict, total=False):
    """How a plan is applied."""

    finetune: Annotated[
        bool | Mapping[str, Any],
        Argument(
            False,
            "True, or arguments of :func:`decomp.finetune_layerwise` as a mapping: train the factors layer by "
            "layer on ``data``; the report is the attribute ``decomp_finetuning`` of the result.",
        ),
    ]
    sequential: Annotated[
        bool | None,
        Argument(
            None,
            "decompose layer after layer, each for its inputs in the network compressed so far and its outputs in "
            "the dense one (Zhang et al. 2016, section 3.3). By default where ``data`` are batches that can be "
            "gone through again, and not ``inplace``. A layer uses as many batches as it needs, spread over the "
            "data. False: all layers for their inputs in the dense network, in one pass. "
            "True with ``finetune``: each layer is trained before the next is decomposed, and not all "
            "of them afterwards.",
        ),
    ]
    inplace: Annotated[
        bool,
        Argument(False, "change ``model`` itself; all factors are computed before the first layer is replaced."),
    ]


class RankLimits(TypedDict, total=False):
    """Which ranks rules and budgets may choose; ranks that the user fixes are not limited."""

    multiple_of: Annotated[
        int,
        Argument(
            1,
            "ranks that a rule or a budget chooses are multiples of it, or full; rules without a bound are "
            "rounded up. 8 is efficient on GPUs, and from 2 on no rank is 1, which some int8 kernels refuse.",
        ),
    ]
    min_gain: Annotated[
        float,
        Argument(
            MIN_GAIN,
            "a layer for which a rule or a budget chooses is replaced only where that saves at least this share "
            "of its parameters or of its MACs; 0 accepts any saving.",
        ),
    ]


class BudgetArguments(Bounds, RankLimits, total=False):
    """The budget, and how it is distributed over the layers."""

    runtime: Annotated[
        str | Runtime | None,
        Argument(
            None,
            'where seconds are measured: a name such as "openvino-int8" (``decomp.runtimes.RUNTIMES``), or a '
            "``decomp.runtimes.Runtime`` of your own. ``seconds`` is then a share of the dense model's time, "
            "in (0, 1], or ``decomp.seconds(0.010)``. Layers are timed there with what follows them, the whole "
            "network is measured, and the bound is corrected until it is kept. Ranks are multiples that it "
            "was found to like. Int8 needs ``data``.",
        ),
    ]
    methods: Annotated[
        str | Sequence[str | Method],
        Argument(
            "auto",
            'methods to choose from, names of rows of ``decomp.methods.METHODS``; "auto" is svd and tucker, whose '
            "error is known at all ranks from one decomposition.",
        ),
    ]
    objective: Annotated[
        str,
        Argument(
            "auto",
            '"product": maximize the product of the shares of energy that the layers retain (Zhang et al. 2016, '
            'section 3.2.3); "sum": minimize the sum of squared relative errors; "max": minimize the largest '
            'relative error of a layer (Liebenwein et al. 2021); "network": as "product", each layer weighted by '
            "the sensitivity of the network's output to its error, which needs ``data`` from "
            '``calibrate(..., loss=)``. "auto" measures the sensitivity where ``data`` are batches, by a backward '
            "pass for each, and takes the one of the two that leaves the output nearer to the dense one on "
            'held-out batches; it is "network" where ``data`` holds the sensitivity, else "product".',
        ),
    ]
    weights: Annotated[
        Mapping[str, float] | None,
        Argument(
            None,
            "weights of the layers' losses, by name, 1 by default: from :func:`decomp.sensitivity`, for instance.",
        ),
    ]


class CallArguments(RankLimits, Scope, Application, total=False):
    """The arguments of a call that plans by rank rules and applies the plan, as :func:`decomp.tucker` does."""


class PlanArguments(MethodOptions, BudgetArguments, Scope, total=False):
    """The arguments of :func:`decomp.plan`."""


class CompressArguments(BudgetArguments, Selection, Application, total=False):
    """The arguments of :func:`decomp.compress`."""
