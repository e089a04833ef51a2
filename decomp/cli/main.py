"""The command line: ``decomp demo``, ``decomp --version``."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from decomp._util.version import installed_version


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
    parser = argparse.ArgumentParser("decomp", description="Make trained PyTorch models smaller and faster.")
    parser.add_argument("--version", action="version", version=f"decomp {installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="compress a small network that reads handwritten digits (a minute)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, network and training (default 0)")
    demo.add_argument("--out", type=Path, default=Path("decomp-demo"), help="folder for what it writes")
    demo.set_defaults(run=_demo)
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        print(f"the demo needs {' and '.join(missing)}: pip install 'decomp[demo]'", file=sys.stderr)
        return 1
    from decomp.demo.run import run

    run(options.out, options.seed, lambda text: print(text, flush=True))
    return 0
