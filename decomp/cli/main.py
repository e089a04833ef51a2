"""The command line: ``decomp plan``, ``compress``, ``compare``, ``tradeoff``, ``report``, ``export``, ``demo``."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from decomp._util.version import installed_version
from decomp.cli import commands
from decomp.cli.models import read_arguments
from decomp.cli.values import InputSpec, budget
from decomp.planning.budget import OutOfReach
from decomp.planning.build import NothingToDecompose
from decomp.planning.cost import COSTS, COUNTED

INTERRUPTED = 130
Parsed = TypeVar("Parsed")

DESCRIPTION = """\
Make trained PyTorch models smaller and faster by low-rank and tensor decomposition.

  decomp plan mynet:Net --weights net.safetensors --input 1x3x224x224 > plan.json    look, and edit
  decomp compress mynet:Net --weights net.safetensors --plan plan.json --output small.safetensors
  decomp compare mynet:Net small.safetensors --weights net.safetensors --input 1x3x224x224
  decomp export mynet:Net small.safetensors --input 1x3x224x224 --output small.onnx

MODEL is "package.module:factory", a class or function that makes the dense model (modules of the
working directory are found), or the folder of a Hugging Face model. `decomp COMMAND --help` has examples.
"""
EPILOG = """\
Results go to stdout, tables beside JSON, progress and errors to stderr.
Exit status: 0 done, 1 wrong input, 2 wrong options, 3 what was asked for cannot be had (a budget that is
out of reach, nothing to decompose, --max-drop exceeded), 130 interrupted.
"""
PLAN_EXAMPLES = """\
examples:
  decomp plan mynet:Net --weights net.safetensors                       ranks by vbmf, layer by layer
  decomp plan mynet:Net --ranks "energy(0.9)" --method svd
  decomp plan mynet:Net --ranks "layer3.*=32,16" --ranks fc=vbmf        only these layers
  decomp plan mynet:Net --macs 0.5 --input 1x3x224x224 --data images/   half the MACs, fitted to data
  decomp plan ./bert --params 60% --keep-dense "*.embeddings.*" > plan.json
  decomp plan mynet:Net --plan plan.json --macs 0.4 --input 1x3x224x224 a plan, under another budget

On a terminal the plan is shown as a table. Elsewhere stdout gets JSON, and stderr the table. In the JSON,
change "ranks" (a list; [] for dense) or "kept_dense" of a layer; the next command counts its costs anew.
"""
COMPRESS_EXAMPLES = """\
examples:
  decomp compress mynet:Net --weights net.safetensors --params 0.5 --output small.safetensors
  decomp compress mynet:Net --weights net.safetensors --plan plan.json --output small.safetensors
  decomp compress mynet:Net --weights net.safetensors --macs 0.3 --input 1x3x224x224 \\
      --data images/ --evaluate mynet:accuracy --output small.safetensors
  decomp compress ./bert --ranks "energy(0.95)" --method svd --output ./bert-small
  torchrun --nproc-per-node 4 -m decomp compress ./llama --weights-only --ranks "params(0.5)" \\
      --output ./llama-small

The output is one file, which decomp.load("small.safetensors", Net()) reads; that of a Hugging Face folder is a
folder for from_pretrained (import decomp.huggingface first), with its tokenizer.
"""
COMPARE_EXAMPLES = """\
examples:
  decomp compare mynet:Net small.safetensors --weights net.safetensors --input 1x3x224x224
  decomp compare mynet:Net --plan plan.json --weights net.safetensors --input 8x3x224x224
  decomp compare ./bert ./bert-small --input input_ids=1x128:int64 --evaluate mytask:accuracy --max-drop 0.01
"""
REPORT_EXAMPLES = """\
examples:
  decomp report mynet:Net small.safetensors --weights net.safetensors --input 1x3x224x224 --output report.html
"""
EXPORT_EXAMPLES = """\
examples:
  decomp export mynet:Net small.safetensors --input 1x3x224x224 --output small.onnx
  decomp export mynet:Net small.safetensors --input 1x3x224x224 --data images/ --int8 --output small.xml
  decomp export mynet:Net --weights net.safetensors --input 1x3x224x224 --output dense.pt2

Without SMALL and --plan the dense model is exported. The file is run and compared with PyTorch before it is put
in place.
"""
TRADEOFF_EXAMPLES = """\
examples:
  decomp tradeoff mynet:Net --weights net.safetensors --input 1x3x224x224 --evaluate mynet:accuracy
  decomp tradeoff mynet:Net --input 1x3x32x32 --held-out images/ --budgets 0.7,0.5,0.3 --methods auto \\
      --methods svd_spatial,tucker --rules vbmf --rules "energy(0.9)" --plot tradeoff.png
  decomp tradeoff mynet:Net --input 1x3x32x32 --evaluate mynet:accuracy --points points.json \\
      --max-drop 0.01 --best-plan plan.json

Without --evaluate the score is the relative error of the output, on --held-out or else on random inputs.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: what follows ``decomp``; by default ``sys.argv[1:]``.

    Raises:
        SystemExit: the arguments are unknown or missing, or ask for help or the version.

    >>> try:
    ...     main(["demo", "--help"])
    ... except SystemExit as exit:
    ...     exit.code  # doctest: +ELLIPSIS
    usage: decomp demo ...
    0
    """
    top = parser()
    options, unknown = top.parse_known_args(arguments)
    if unknown:  # argparse would show the usage of all commands
        getattr(options, "parser", top).error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with _warnings_as_lines():
            status: int = options.run(options)
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("decomp: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `decomp plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if getattr(options, "traceback", False):
            raise
        print(f"decomp: {_text_of(error)}", file=sys.stderr)
        return commands.NOT_MET if isinstance(error, OutOfReach | NothingToDecompose) else 1


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser("decomp", description=DESCRIPTION, epilog=EPILOG, **_STYLE)
    top.add_argument("--version", action="version", version=f"decomp {installed_version()}")
    added = top.add_subparsers(required=True, metavar="COMMAND")

    plan = _command(added, "plan", "choose method and ranks of every layer", PLAN_EXAMPLES, commands.plan_command)
    _model_options(plan)
    _input_options(plan)
    _plan_options(plan)
    _general_options(plan, json=False)
    plan.add_argument(
        "--json",
        action=argparse.BooleanOptionalAction,
        help="print the plan as JSON; by default where stdout is no terminal",
    )
    plan.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file instead")

    compress = _command(
        added, "compress", "write the compressed model", COMPRESS_EXAMPLES, commands.compress_command
    )
    _model_options(compress)
    _input_options(compress)
    _plan_options(compress)
    group = compress.add_argument_group("recovery")
    group.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        help="decompose layer after layer, each for the inputs that it gets in the network compressed so far "
        "(default with --data)",
    )
    group.add_argument(
        "--finetune", action="store_true", help="train the factors layer by layer against the dense model"
    )
    group.add_argument("--evaluate", metavar="FUNCTION", help=_EVALUATE)
    compress.add_argument(
        "--weights-only",
        action="store_true",
        help="compress a Hugging Face checkpoint tensor by tensor, also one larger than memory; the same command "
        "goes on after a kill",
    )
    _general_options(compress)
    compress.add_argument("--output", type=Path, required=True, help="the file or folder to write")
    compress.add_argument("--overwrite", action="store_true", help="replace a compressed model that is there")

    for name, summary, examples, run in (
        ("compare", "costs and scores of both models", COMPARE_EXAMPLES, commands.compare_command),
        ("report", "one HTML file about a compressed model", REPORT_EXAMPLES, commands.report_command),
    ):
        command = _command(added, name, summary, examples, run)
        _model_options(command)
        command.add_argument("small", nargs="?", type=Path, metavar="SMALL", help="what decomp compress wrote")
        command.add_argument("--plan", type=Path, metavar="FILE", help="apply this plan in place of SMALL")
        _input_options(command)
        command.add_argument("--evaluate", metavar="FUNCTION", help=_EVALUATE)
        _general_options(command)
        if name == "compare":
            command.add_argument(
                "--max-drop", type=float, metavar="DROP", help="exit with 3 if the score fell by more than this"
            )
        else:
            command.add_argument("--output", type=Path, default=Path("report.html"), help="default report.html")

    curve = _command(
        added, "tradeoff", "cost against accuracy over budgets", TRADEOFF_EXAMPLES, commands.tradeoff_command
    )
    _model_options(curve)
    _input_options(curve)
    _tradeoff_options(curve)
    _general_options(curve)

    exported = _command(
        added, "export", "a file for ONNX, OpenVINO or torch.export", EXPORT_EXAMPLES, commands.export_command
    )
    _model_options(exported)
    exported.add_argument("small", nargs="?", type=Path, metavar="SMALL", help="what decomp compress wrote")
    exported.add_argument("--plan", type=Path, metavar="FILE", help="apply this plan in place of SMALL")
    _input_options(exported)
    exported.add_argument(
        "--int8", action="store_true", help="quantize weights and activations, with ranges chosen on --data"
    )
    exported.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold BatchNorm and merge factors first",
    )
    _general_options(exported)
    exported.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="ending with .onnx, .xml (OpenVINO) or .pt2"
    )
    exported.add_argument("--overwrite", action="store_true", help="replace a file that is there")

    demo = added.add_parser("demo", help="compress a small network that reads handwritten digits (a minute)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, network and training (default 0)")
    demo.add_argument("--out", type=Path, default=Path("decomp-demo"), help="folder for what it writes")
    demo.set_defaults(run=commands.demo_command)
    return top


_STYLE: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
_EVALUATE = '"package.module:function" of a model that returns its score; higher is better'


def _command(
    added: Any, name: str, summary: str, examples: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = added.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=examples, **_STYLE
    )
    command.set_defaults(run=run, parser=command)
    return command


def _model_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the dense model")
    group.add_argument("model", metavar="MODEL", help='"package.module:factory", or a Hugging Face folder')
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="of the factory's model: .safetensors, or .pt with a state dict",
    )
    group.add_argument(
        "--arguments", type=_typed(read_arguments), metavar="JSON", help="keyword arguments of the factory"
    )
    group.add_argument("--device", default="cpu", help='"cuda" for example (default cpu)')


def _input_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("inputs and data")
    group.add_argument(
        "--input",
        action="append",
        default=[],
        type=_typed(InputSpec.parse),
        metavar="[NAME=]SIZES[:TYPE]",
        help="sizes of an argument of the model, batch first: 1x3x224x224, input_ids=1x128:int64; repeated "
        "for several arguments",
    )
    group.add_argument(
        "--data",
        metavar="DATA",
        help="batches that the factors are fitted to: a folder of .pt, .safetensors or .npy files, a batch each; "
        'a folder of images; or "package.module:loader"',
    )
    group.add_argument(
        "--batch-inputs",
        metavar="WHAT",
        help='what of a batch the model is called with: a position (0), a key, or "package.module:function"',
    )
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="images in a batch (default 32)")
    group.add_argument(
        "--mean",
        type=_typed(_numbers),
        default=(0.0,),
        metavar="M,M,M",
        help="of the channels of images in [0, 1]",
    )
    group.add_argument(
        "--std", type=_typed(_numbers), default=(1.0,), metavar="S,S,S", help="of the channels of images"
    )


def _selection_options(group: Any) -> None:
    group.add_argument("--layers", action="append", metavar="GLOB", help="only these layers; may be repeated")
    group.add_argument("--exclude", action="append", metavar="GLOB", help="not these layers; may be repeated")


def _plan_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("method and ranks, layer by layer")
    group.add_argument("--method", help="svd, tucker (default), cp, ...: a row or family of the table of methods")
    group.add_argument(
        "--ranks",
        action="append",
        metavar="RANKS",
        help='"vbmf" (default), "energy(0.9)", "params(0.5)", 16, 32,16; or "GLOB=RANKS", which may be repeated',
    )
    group = command.add_argument_group("or one budget for all layers together")
    for kind, row in COSTS.items():
        amounts = "0.5, 50%%, or an absolute number" if kind in COUNTED else "0.02; layers are timed here"
        group.add_argument(f"--{kind}", type=_typed(budget), metavar="BUDGET", help=f"{row.label}: {amounts}")
    group.add_argument("--methods", type=lambda text: text.split(","), metavar="M,M", help="to choose from")
    group.add_argument("--objective", help="auto (default), product, sum, max or network")
    group = command.add_argument_group("or a plan, and limits")
    group.add_argument("--plan", type=Path, metavar="FILE", help="what decomp plan wrote; - reads stdin")
    group.add_argument("--multiple-of", type=int, metavar="N", help="ranks that are chosen are multiples of N")
    group.add_argument("--min-gain", type=float, metavar="SHARE", help="least saving of a layer (default 0.05)")
    _selection_options(group)
    group.add_argument(
        "--keep-dense", action="append", metavar="GLOB", help="leave these layers dense in the plan"
    )


def _tradeoff_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what is measured")
    group.add_argument("--evaluate", metavar="FUNCTION", help=_EVALUATE)
    group.add_argument("--held-out", metavar="DATA", help="batches that the output error is measured on")
    group.add_argument(
        "--budgets", type=_typed(_numbers), metavar="B,B", help="shares of the cost (default 0.75 to 0.15)"
    )
    group.add_argument(
        "--cost", default="macs", choices=list(COSTS), help="what they are shares of (default macs)"
    )
    group.add_argument(
        "--methods", action="append", metavar="M[,M]", help="a line of the figure (default auto); may be repeated"
    )
    group.add_argument("--rules", action="append", metavar="RULE", help='"energy(0.9)" besides; may be repeated')
    group.add_argument("--plan", type=Path, metavar="FILE", help="layers that this plan keeps dense stay dense")
    _selection_options(group)
    group = command.add_argument_group("what is written")
    group.add_argument(
        "--points", type=Path, metavar="FILE", help="keep points that are done; a later call goes on"
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure: .png, .svg or .pdf")
    group.add_argument("--max-drop", type=float, metavar="DROP", help="tolerated fall of the score (0.01)")
    group.add_argument(
        "--best-plan", type=Path, metavar="FILE", help="write the plan of the cheapest tolerable point"
    )


def _general_options(command: argparse.ArgumentParser, *, json: bool = True) -> None:
    if json:
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress, and no table beside JSON")
    command.add_argument("--traceback", action="store_true", help="show where an error came from")


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    >>> _numbers("0.5,0.25")
    (0.5, 0.25)
    """
    return tuple(float(part) for part in text.split(","))


def _typed(read: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """A function as argparse wants it: what is wrong with a value is said in full."""

    def typed(text: str) -> Parsed:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Write warnings of the block without the lines of code that they come from."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"decomp: warning: {_in_options(str(message))}", file=sys.stderr, flush=True)

    before = warnings.showwarning
    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before


def _text_of(error: Exception) -> str:
    """An error as one paragraph; that of a program of the user's has its type."""
    expected = isinstance(error, ValueError | TypeError | ImportError | OSError)
    text = str(error) if expected else f"{type(error).__name__}: {error} (--traceback shows where)"
    notes = "; ".join(getattr(error, "__notes__", ()))
    return _in_options(f"{text} ({notes})" if notes else text)


OPTIONS = {
    "example_inputs": "--input",
    "inputs": "--batch-inputs",
    "keep_dense": "--keep-dense",
    "max_drop": "--max-drop",
    "min_gain": "--min-gain",
    "multiple_of": "--multiple-of",
} | {
    name: f"--{name}" for name in ("budgets", "cost", "data", "evaluate", "exclude", "finetune", "layers", *COSTS)
}
OPTIONS |= {
    name: f"--{name}" for name in ("method", "methods", "objective", "ranks", "rules", "sequential", "int8")
}
ARGUMENT = re.compile(r"(?<![\w.-])(\w+)=(?=[\s,:;.)]|$|['\"\d\[(])")


def _in_options(text: str) -> str:
    """A message of the library with its arguments as options.

    >>> _in_options("a budget needs the sizes of inputs: give example_inputs=")
    'a budget needs the sizes of inputs: give --input'
    """
    return ARGUMENT.sub(lambda match: OPTIONS.get(match[1], match[0]) + _gap(match), text)


def _gap(match: re.Match[str]) -> str:
    """A space where a value follows."""
    following = match.string[match.end() : match.end() + 1]
    return " " if match[1] in OPTIONS and following and following not in " ,:;.)" else ""
