"""What each command does; each returns the exit status."""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import nn

from decomp import api
from decomp._util.io import UNFINISHED, write_atomically
from decomp.analysis.compare import Comparison, compare
from decomp.analysis.html_report import report
from decomp.analysis.scores import Scorer
from decomp.analysis.tradeoff import tradeoff
from decomp.calibration.calibrate import calibrate
from decomp.cli.data import chooser, open_data
from decomp.cli.models import Source
from decomp.cli.values import example, is_reference, rank_request, rank_rule, resolve
from decomp.files.checkpoints import Processes, compress_checkpoint, copy_companions
from decomp.files.save import save
from decomp.network.forward import moved
from decomp.planning.cost import COSTS
from decomp.planning.plan import Plan
from decomp.runtimes.export import export

DONE, NOT_MET = 0, 3


def say(text: object) -> None:
    """Write for people, on stderr: stdout holds results alone."""
    print(text, file=sys.stderr, flush=True)


class Job:
    """What the options of a command describe, opened when it is first needed.

    Args:
        options: as they were parsed.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.source = Source(options.model, options.weights, options.arguments, options.device)

    @property
    def progress(self) -> bool | None:
        """Whether bars are shown; by default where there is a terminal."""
        return False if self.options.quiet else None

    @cached_property
    def model(self) -> nn.Module:
        """The dense model."""
        if not self.source.is_folder and self.source.weights is None and not self.options.quiet:
            say(f"no --weights: the weights are those that {self.source.text} gives")
        return self.source.dense()

    @cached_property
    def inputs(self) -> Callable[[Any], Any] | None:
        """What of a batch the model is called with."""
        text = self.options.batch_inputs
        return None if text is None else chooser(text)

    @cached_property
    def data(self) -> Iterable[Any] | None:
        """The batches that factors are fitted to."""
        return self.batches(self.options.data, "--data")

    def batches(self, text: str | None, option: str) -> Iterable[Any] | None:
        """Open the data of an option; None where it was not given."""
        if text is None:
            return None
        o = self.options
        return open_data(text, o.input, option=option, batch_size=o.batch_size, mean=o.mean, std=o.std)

    @cached_property
    def example(self) -> Any | None:
        """The batch of --input, else the first one of the data, else None."""
        batch = None
        if self.options.input:
            batch = example(self.options.input)
        elif self.data is not None:
            batch = next(iter(self.data), None)
            batch = self.inputs(batch) if self.inputs is not None and batch is not None else batch
        return moved(batch, torch.device(self.options.device))

    def needed_example(self) -> Any:
        """The example of a command that runs the model.

        Raises:
            ValueError: there is none.
        """
        if self.example is None:
            raise ValueError(
                "this command runs the model: give the sizes of its inputs, --input 1x3x224x224 for example, or "
                "--input input_ids=1x128:int64, or give --data"
            )
        return self.example

    @cached_property
    def evaluate(self) -> Callable[[nn.Module], float] | None:
        """The function that scores a model."""
        text = self.options.evaluate
        return None if text is None else resolve(text, "--evaluate")

    def plan(self) -> Plan:
        """Make the plan that the options ask for: a new one, or that of a file, changed.

        Raises:
            ValueError: options contradict each other, or the plan is not one, or of another model.
        """
        o = self.options
        budgets = {kind: value for kind in COSTS if (value := getattr(o, kind)) is not None}
        shared: dict[str, Any] = {"layers": o.layers, "exclude": o.exclude or (), "progress": self.progress}
        shared |= {"example_inputs": self.example, "data": self.data, "inputs": self.inputs}
        limits = {name: getattr(o, name) for name in ("multiple_of", "min_gain") if getattr(o, name) is not None}
        spending = {
            name: getattr(o, name) for name in ("methods", "objective") if getattr(o, name) is not None
        } | limits
        if o.plan is not None:
            if o.method is not None or o.ranks or o.methods:
                raise ValueError("--plan decides methods and ranks: leave --method, --methods and --ranks out")
            decided = api.plan(self.model, ranks=read_plan(o.plan), **shared)
            if budgets:
                decided = decided.with_budget(**budgets, **spending)
            elif spending:
                raise ValueError(f"{', '.join(spending)} need a budget beside --plan: {', '.join(COSTS)}")
        elif budgets:
            if o.method is not None or o.ranks:
                raise ValueError("a budget chooses methods and ranks: leave --method and --ranks out")
            decided = api.plan(self.model, **budgets, **spending, **shared)
        else:
            spec = rank_request(o.ranks) if o.ranks else "vbmf"
            decided = api.plan(self.model, o.method or "tucker", spec, **spending, **shared)
        for glob in o.keep_dense or ():
            decided = decided.keep_dense(glob)
        return decided


def read_plan(path: Path) -> Plan:
    """Read the plan of a file, "-" for stdin; a layer that is marked as kept dense becomes dense.

    Raises:
        ValueError: there is no such file, or it holds no plan.
    """
    if str(path) == "-":
        text = sys.stdin.read()
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(f"--plan {str(path)!r}: there is no such file; decomp plan MODEL > plan.json writes one")
    try:
        plan = Plan.from_json(text)
    except ValueError as error:
        raise ValueError(f"--plan {str(path)!r}: {error}") from None
    for name, choice in plan.items():
        if choice.kept_dense and choice.ranks:
            plan = plan.keep_dense(name)
    return plan


def plan_command(options: Namespace) -> int:
    """``decomp plan``: the table for people, the JSON for the next command."""
    job = Job(options)
    decided = job.plan()
    as_json = options.json if options.json is not None else not sys.stdout.isatty()
    if options.output is not None:
        write_atomically(options.output, f"{decided.to_json()}\n".encode())
        say(f"wrote {options.output}")
        as_json = bool(options.json)
    if as_json:
        if not options.quiet:
            say(decided)
        print(decided.to_json())
    else:
        print(decided)
    return DONE


def compress_command(options: Namespace) -> int:
    """``decomp compress``: a file, or a folder of Hugging Face."""
    if options.weights_only:
        return compress_weights(options)
    job = Job(options)
    output = options.output
    as_folder = job.source.is_folder and output.suffix != ".safetensors"
    require_free(output, overwrite=options.overwrite, as_folder=as_folder)
    given = {
        "finetune": options.finetune,
        "sequential": options.sequential,
        "no-sequential": options.sequential is False,
    }
    needing = [name for name, is_given in given.items() if is_given]
    if needing and job.data is None:
        raise ValueError(f"--{needing[0]} needs --data")
    dense_score = None if job.evaluate is None else Scorer(job.model, None, job.evaluate)(job.model)
    decided = job.plan()
    settings: dict[str, Any] = {"progress": job.progress}
    if job.data is not None and (options.finetune or options.sequential is not False):
        settings |= {"data": job.data, "inputs": job.inputs}
        settings |= {"finetune": options.finetune, "sequential": options.sequential}
        small: nn.Module = api.tucker(job.model, decided, **settings)
    else:
        small = decided.apply(job.model, inplace=True, **settings)
    scores = None
    if dense_score is not None:
        scores = {"dense": dense_score, "small": Scorer(small, None, job.evaluate)(small)}
    write(small, output, job.source, as_folder=as_folder)
    show_compressed(small.decomp_plan, output, scores, as_json=options.json)  # type: ignore[arg-type]
    return DONE


def compress_weights(options: Namespace) -> int:
    """``decomp compress --weights-only``: a checkpoint of Hugging Face, tensor by tensor.

    Raises:
        ValueError: an option was given that needs the model.
    """
    o = options
    needing = ["weights", "arguments", "input", "data", "batch_inputs", "evaluate", "methods", "objective", *COSTS]
    given = [name for name in (*needing, "sequential", "finetune", "overwrite") if getattr(o, name)]
    given += ["no_sequential"] if o.sequential is False else []
    if given:
        raise ValueError(
            f"--weights-only loads no model: leave --{given[0].replace('_', '-')} out (for a bound on every layer "
            'write --ranks "params(0.5)")'
        )
    if is_reference(o.model):
        raise ValueError(f"--weights-only takes the folder of a checkpoint, not {o.model!r}")
    if o.plan is not None and (o.method is not None or o.ranks):
        raise ValueError("--plan decides methods and ranks: leave --method and --ranks out")
    ranks = read_plan(o.plan) if o.plan is not None else rank_request(o.ranks) if o.ranks else "vbmf"
    made = compress_checkpoint(
        o.model,
        o.output,
        method=o.method or "svd",
        ranks=ranks,
        layers=o.layers,
        exclude=[*(o.exclude or ()), *(o.keep_dense or ())],
        multiple_of=o.multiple_of or 1,
        min_gain=o.min_gain,
        device=o.device,
        progress=False if o.quiet else None,
    )
    if Processes.of_launch().rank == 0:
        show_compressed(made, o.output, None, as_json=o.json)
    return DONE


def show_compressed(made: Plan, output: Path, scores: dict[str, float] | None, *, as_json: bool) -> None:
    """Print the result of ``decomp compress``."""
    costs = {kind: change for kind in COSTS if (change := made.cost(kind)) is not None}
    if as_json:
        plan = json.loads(made.to_json())
        print_json({"output": str(output), "costs": costs, "scores": scores, "plan": plan})
        return
    print(made)
    if scores is not None:
        print(f"\nscore {scores['dense']:.4f} => {scores['small']:.4f}")
    print(f"\nwrote {output}")


def require_free(output: Path, *, overwrite: bool, as_folder: bool) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Raises:
        ValueError: its folder does not exist, or something else than compressed models is in the way.
    """
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {str(output)!r}: there is no folder {str(output.parent)!r}; make it first")
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"--output {str(output)!r} exists: write another path, or --overwrite")
    if output.is_dir() and not as_folder:
        raise ValueError(f"--output {str(output)!r} is a folder: write the path of a file")
    if as_folder:
        from decomp.huggingface import is_compressed

        if not output.is_dir() or not (output / "config.json").is_file() or not is_compressed(output):
            raise ValueError(
                f"--output {str(output)!r} holds no compressed model: --overwrite replaces nothing else"
            )


def write(small: nn.Module, output: Path, source: Source, *, as_folder: bool) -> None:
    """Write a compressed model; the output has its old or its whole new content."""
    if not as_folder:
        constructor = None if source.is_folder else source.constructor
        save(small, output, constructor=constructor, arguments=source.arguments if constructor else None)
        return
    unfinished = Path(mkdtemp(prefix=UNFINISHED, dir=output.absolute().parent))
    try:
        small.save_pretrained(unfinished)  # type: ignore[operator]
        copy_companions(Path(source.text), unfinished)
        if output.exists():
            shutil.rmtree(output)
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def both(job: Job) -> nn.Module:
    """The compressed model of a command that takes a file, or a plan to apply.

    Raises:
        ValueError: neither or both are given.
    """
    o = job.options
    if (o.small is None) == (o.plan is None):
        raise ValueError("give the compressed model, as SMALL, or --plan to apply to the model")
    if o.small is not None:
        return job.source.compressed(o.small)
    decided = api.plan(job.model, ranks=read_plan(o.plan), example_inputs=job.example, progress=job.progress)
    return decided.apply(job.model, progress=job.progress)


def compare_command(options: Namespace) -> int:
    """``decomp compare``: costs and scores of both models, measured in turn."""
    job = Job(options)
    batch = job.needed_example()
    compared = compare(both(job), job.model, batch, evaluate=job.evaluate)
    if options.json:
        print_json(described(compared))
    else:
        print(compared)
    if options.max_drop is None:
        return DONE
    if compared.scores is None:
        raise ValueError("--max-drop is about the score: give --evaluate")
    drop = compared.scores[1] - compared.scores[0]
    if drop > options.max_drop:
        say(f"the score fell by {drop:.4g}, more than --max-drop {options.max_drop:g}")
        return NOT_MET
    return DONE


def described(compared: Comparison) -> dict[str, Any]:
    """A comparison as JSON holds it."""
    kinds = ("params", "macs", "bytes", "seconds")
    totals = {
        name: {kind: getattr(profile.total, kind) for kind in kinds}
        for name, profile in (("dense", compared.dense), ("small", compared.small))
    }
    scores = None if compared.scores is None else dict(zip(("small", "dense"), compared.scores, strict=True))
    return {"models": totals, "scores": scores, "layers": compared.records()}


def report_command(options: Namespace) -> int:
    """``decomp report``: one HTML file."""
    require_matplotlib("decomp report")
    job = Job(options)
    batch = job.needed_example()
    written = report(both(job), job.model, batch, evaluate=job.evaluate, path=options.output)
    if options.json:
        print_json({"output": str(written)})
    else:
        print(f"wrote {written}")
    return DONE


def tradeoff_command(options: Namespace) -> int:
    """``decomp tradeoff``: cost against accuracy at several budgets."""
    if options.plot is not None:
        require_matplotlib("--plot")
    job = Job(options)
    batch = job.needed_example()
    statistics = None
    if job.data is not None:
        statistics = calibrate(
            job.model,
            job.data,
            inputs=job.inputs,
            layers=options.layers,
            exclude=options.exclude or (),
            progress=job.progress,
        )
    held_out = job.batches(options.held_out, "--held-out")
    excluded = list(options.exclude or ())
    if options.plan is not None:
        excluded += [name for name, choice in read_plan(options.plan).items() if choice.kept_dense]
    lines = [line.split(",") for line in options.methods or ["auto"]]
    given: dict[str, Any] = {} if options.budgets is None else {"budgets": options.budgets}
    curve = tradeoff(
        job.model,
        batch,
        evaluate=job.evaluate,
        cost=options.cost,
        methods=[line[0] if len(line) == 1 else line for line in lines],
        rules=[rank_rule(text) for text in options.rules or ()],
        data=held_out,
        inputs=job.inputs if held_out is not None else None,
        statistics=statistics,
        path=options.points,
        layers=options.layers,
        exclude=excluded,
        progress=job.progress,
        **given,
    )
    if options.json:
        print_json({"score": curve.score_name, "lower_is_better": curve.is_error, "points": curve.records()})
    else:
        print(curve)
    max_drop = 0.01 if options.max_drop is None else options.max_drop
    if options.plot is not None:
        curve.plot(max_drop=max_drop).savefig(options.plot, dpi=150)
        say(f"wrote {options.plot}")
    if options.best_plan is None and options.max_drop is None:
        return DONE
    try:
        best = curve.best(max_drop)
    except ValueError as error:
        say(f"decomp: {error}")
        return NOT_MET
    if options.best_plan is not None:
        write_atomically(options.best_plan, f"{best.to_json()}\n".encode())
        budget = best.request.budget
        how = f"{budget.kind}={budget.value:g}" if budget is not None else "ranks by a rule"
        say(f"wrote {options.best_plan}: {how}")
    return DONE


def export_command(options: Namespace) -> int:
    """``decomp export``: a file for another runtime, checked against PyTorch."""
    job = Job(options)
    batch = job.needed_example()
    given = options.small is not None or options.plan is not None
    if options.int8 and job.data is None:
        raise ValueError("--int8 chooses ranges of activations on batches: give --data")
    settings: dict[str, Any] = {"int8": job.data, "inputs": job.inputs} if options.int8 else {}
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"--output {str(options.output)!r} exists: write another path, or --overwrite")
    done = export(both(job) if given else job.model, options.output, batch, fold=options.fold, **settings)
    if options.json:
        print_json({name: str(value) if isinstance(value, Path) else value for name, value in vars(done).items()})
    else:
        print(done)
    return DONE


def demo_command(options: Namespace) -> int:
    """``decomp demo``."""
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        say(f"the demo needs {' and '.join(missing)}: pip install 'decomp[demo]'")
        return 1
    from decomp.demo.run import run

    run(options.out, options.seed, lambda text: print(text, flush=True))
    return DONE


def require_matplotlib(what: str) -> None:
    """Refuse to draw before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(f"{what} needs matplotlib: pip install 'decomp[notebook]'")


def print_json(value: Any) -> None:
    """Print a result; what JSON cannot hold becomes null."""

    def plain(each: Any) -> Any:
        if isinstance(each, dict):
            return {str(key): plain(inner) for key, inner in each.items()}
        if isinstance(each, list | tuple):
            return [plain(inner) for inner in each]
        return None if isinstance(each, float) and not isfinite(each) else each

    print(json.dumps(plain(value), indent=1))
