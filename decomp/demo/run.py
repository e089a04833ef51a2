"""The demo: a network that reads digits, compressed with vbmf ranks and fine-tuned layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from decomp._util import tables
from decomp._util.progress import bar
from decomp.analysis.compare import compare
from decomp.analysis.drawing import MUTED, colours, label_points, new_figure, style
from decomp.api import plan
from decomp.digits import Digits, load_digits, train
from decomp.files.save import save
from decomp.planning.choice import Change
from decomp.planning.plan import Plan
from decomp.ranks import energy
from decomp.training.layerwise import FinetuneReport, finetune_layerwise

ENERGIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Outcome:
    """One compressed network.

    Args:
        name: the rank rule.
        model: the network after fine-tuning.
        macs: multiply-adds per image.
        accuracy_compressed: share of the held-out digits that it reads correctly before fine-tuning.
        accuracy_finetuned: the same after fine-tuning.
        report: of the fine-tuning.
    """

    name: str
    model: nn.Module
    macs: float
    accuracy_compressed: float
    accuracy_finetuned: float
    report: FinetuneReport


def run(folder: Path, seed: int = 0, say: Callable[[str], None] = print) -> tuple[float, Outcome]:
    """Train, compress, fine-tune and report; return the accuracy of the dense network and the compressed one.

    Args:
        folder: where ``tradeoff.png`` and ``digits-tucker.safetensors`` are written; made if it does not exist.
        seed: of the data, the network and its training.
        say: called with each piece of the report.

    Raises:
        ImportError: scikit-learn or matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits(seed)
    say(f"Training a residual network on {sum(len(images) for images in digits.images)} handwritten digits ...")
    dense = train(digits, seed)
    accuracy, image = digits.accuracy(dense), digits.test[0][:1]
    vbmf_plan = plan(dense, "tucker", "vbmf", example_inputs=image, progress=False)
    say(f'\nThe plan of decomp.tucker(model, ranks="vbmf"):\n\n{vbmf_plan}\n')
    say("Fine-tuning layer by layer against the dense network, without labels ...\n")
    outcome = compress(dense, vbmf_plan, digits, "vbmf", progress=None)
    say(f"{outcome.report}\n\nOne batch of {len(digits.test[0])} digits:\n")
    timed = shipping_runtimes()
    say(f"{compare(outcome.model, dense, digits.test[0], runtimes=timed, data=digits.images)}\n")
    if not timed:
        say("To see its time in a runtime that ships: pip install 'decomp[openvino]'\n")
    stages = {
        "dense": accuracy,
        "compressed": outcome.accuracy_compressed,
        "fine-tuned": outcome.accuracy_finetuned,
    }
    rows = [(stage, f"{share:.1%}") for stage, share in stages.items()]
    say(tables.render("", ("network", ">accuracy on held-out digits"), rows))
    curve = [
        compress(
            dense, vbmf_plan.with_ranks("*", energy(share, pure=True)), digits, f"energy {share:g}", progress=False
        )
        for share in bar(None, "trade-off", ENERGIES)
    ]
    figure, weights = folder / "tradeoff.png", folder / "digits-tucker.safetensors"
    draw(figure, outcome, curve, accuracy, macs_of(vbmf_plan).before)
    save(outcome.model, weights)
    say(f"\nWrote {figure} and {weights}")
    return accuracy, outcome


def compress(dense: nn.Module, decided: Plan, digits: Digits, name: str, progress: bool | None) -> Outcome:
    """Apply a plan and fine-tune layer by layer; measure the accuracy before and after fine-tuning."""
    small = decided.apply(dense, progress=False)
    accuracy_compressed = digits.accuracy(small)
    report = finetune_layerwise(small, dense, digits.images, progress=progress)
    return Outcome(name, small, macs_of(decided).after, accuracy_compressed, digits.accuracy(small), report)


def shipping_runtimes() -> tuple[str, ...]:
    """The runtimes to time the digits in, float32 and int8, of the fastest kind that is installed."""
    kinds = {
        ("openvino", "nncf"): ("openvino", "openvino-int8"),
        ("onnxruntime", "onnx", "onnxscript"): ("onnxruntime", "onnxruntime-int8"),
    }
    return next((names for packages, names in kinds.items() if all(map(find_spec, packages))), ())


def macs_of(decided: Plan) -> Change:
    """MACs of the whole network before and after, of a plan that was made with example inputs.

    Raises:
        ValueError: it was made without.
    """
    if decided.macs is None:
        raise ValueError("the plan was made without example_inputs=, so it counts no MACs")
    return decided.macs


def draw(path: Path, vbmf: Outcome, curve: list[Outcome], accuracy: float, macs: float) -> None:
    """Draw accuracy over MACs: energy thresholds before and after fine-tuning, vbmf, and the dense network."""
    figure, ((axes,),) = new_figure(7.5, 5)
    curve = sorted(curve, key=lambda outcome: outcome.macs)
    costs = [outcome.macs / 1e6 for outcome in curve]
    finetuned = [100 * outcome.accuracy_finetuned for outcome in curve]
    compressed = [100 * outcome.accuracy_compressed for outcome in curve]
    color = colours()[0]
    axes.plot(costs, finetuned, "o-", color=color, label="fine-tuned layer by layer")
    axes.plot(costs, compressed, "o--", color=MUTED, label="compressed only")
    dense = (macs / 1e6, 100 * accuracy)
    labels = [(dense, "dense", style("text.color"))]
    labels += [((cost, height), o.name, MUTED) for cost, height, o in zip(costs, compressed, curve, strict=True)]
    for height, name, of in (
        (vbmf.accuracy_finetuned, "vbmf, fine-tuned", color),
        (vbmf.accuracy_compressed, "vbmf", MUTED),
    ):
        axes.plot(vbmf.macs / 1e6, 100 * height, "*", markersize=15, color=of)
        labels.append(((vbmf.macs / 1e6, 100 * height), name, of))
    axes.plot(*dense, "s", color=style("text.color"), label="dense")
    axes.set(
        xlabel="MACs per image (millions)", ylabel="accuracy on held-out digits (%)", xlim=(0, 1.08 * dense[0])
    )
    axes.set_title("Tucker-2 of a residual network, energy thresholds and vbmf", fontsize=11)
    axes.margins(y=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=3, frameon=False, fontsize=9)
    points, names, colors = zip(*labels, strict=True)
    label_points(axes, points, names, colors)
    figure.savefig(path, dpi=150)
