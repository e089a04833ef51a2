"""A page for every row of ``decomp.methods.METHODS``, and the table of all, written when the site is built.

Formula, chain of layers and source come from the docstrings of the factorized layers, costs from layers that are
built, so that a new method needs no page by hand. What only a person knows about a method stands in
``method_notes/<name>.md``, which its page includes if it is there.
"""

import inspect
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

import decomp
from decomp.layers import Factorized
from decomp.methods import FAMILIES, METHODS, SCHEMES, Method
from decomp.methods.folded_svd import FOLDS
from decomp.network.flops import Call
from decomp.planning.cost import Price

FORMULA = re.compile(
    r"(?<![\w`])((?:[KWy]|W_\w+ [xh])(?:\[[^\]]*\])? = .*?)"
    r"(?=[:.](?: |$)|, (?:ranks|the) | with | over | for each )"
)

# Layers to show a method on, the first that it takes; with the shape of an input.
EXAMPLES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a 3 x 3 convolution of 256 to 256 channels": (nn.Conv2d(256, 256, 3, padding=1), (1, 256, 28, 28)),
    "the 11 x 11 convolution of an image to 96 channels": (nn.Conv2d(3, 96, 11, 4, 2), (1, 3, 224, 224)),
    "a linear layer of 1024 inputs and outputs": (nn.Linear(1024, 1024), (1, 1024)),
    "an LSTM of 512 inputs and hidden units": (nn.LSTM(512, 512), (1, 1, 512)),
}
EXAMPLE_OF = {"monochromatic": "the 11 x 11 convolution of an image to 96 channels"}
SHARES = (0.75, 0.5, 0.25, 0.125)

# Kinds of layers to ask every method about.
PROBES: dict[str, nn.Module] = {
    "`nn.Linear`": nn.Linear(8, 8),
    "Hugging Face `Conv1D`": nn.Linear(8, 8),  # replaced below where transformers is installed
    "`nn.Embedding` (if `layers=` selects it)": nn.Embedding(8, 8),
    "1x1 convolutions": nn.Conv2d(8, 8, 1),
    "convolutions along one axis (`k`, `1 x k`)": nn.Conv1d(8, 8, 3),
    "convolutions of two axes (`k x k`, `1 x k x k`)": nn.Conv2d(8, 8, 3),
    "convolutions of three axes (`k x k x k`)": nn.Conv3d(8, 8, 3),
    "transposed convolutions": nn.ConvTranspose2d(8, 8, 3),
    "`nn.LSTM`, `nn.GRU`, `nn.RNN`": nn.LSTM(8, 8),
    "fused experts of transformers": decomp.layers.ExpertLinear(2, 8, 8),
}
try:
    from transformers.pytorch_utils import Conv1D

    PROBES["Hugging Face `Conv1D`"] = Conv1D(8, 8)
except ImportError:
    del PROBES["Hugging Face `Conv1D`"]


def one_line_call(name: str) -> str:
    """The call of decomp that applies a row of the table, or the way by a plan."""
    folds = {method.name: f'decomp.svd(model, fold="{fold}")' for fold, method in FOLDS.items()}
    schemes = {method.name: f'decomp.separable(model, scheme="{scheme}")' for scheme, method in SCHEMES.items()}
    own = {"svd": "decomp.svd(model)", "cp4": "decomp.cp(model, modes=4)"}
    own |= {each: f"decomp.{each}(model)" for each in (*FAMILIES, "flattened") if hasattr(decomp, each)}
    known = schemes | folds | own
    return known.get(name, f'decomp.plan(model, "{name}", ranks).apply(model)')


def layers_of(method: Method) -> list[type[Factorized]]:
    """The factorized layers of a method, each once."""
    return list(dict.fromkeys(method.layers.values()))


def text_of(layer: type[Factorized]) -> str:
    """The docstring of a layer without its doctests."""
    doc = inspect.cleandoc(layer.__doc__ or "")
    return "\n".join(line for line in doc.split("\n>>>")[0].splitlines()).strip()


def sentence(text: str, pattern: str) -> str:
    found = re.search(pattern, re.sub(r"\s+", " ", text))
    return found.group(1).strip() if found else ""


def formulas_of(method: Method) -> list[str]:
    """Formulas in the docstrings of the layers, such as K[t, s] = sum_m A[t, s, m] F[s, m]."""
    found = []
    for layer in layers_of(method):
        found += FORMULA.findall(re.sub(r"\s+", " ", text_of(layer)))
    return list(dict.fromkeys(found))


def source_of(method: Method) -> str:
    """The paper that the docstring of the first layer names."""
    for layer in layers_of(method):
        for each in layer.__mro__:
            source = sentence(inspect.getdoc(each) or "", r"Source: (.*?)(?:\.(?= [A-Z>]|$)|, who |, for m = 1|$)")
            if source:
                return source
    return ""


def latex(formula: str) -> str:
    r"""A formula of a docstring in LaTeX.

    >>> latex("K[t, s] = sum_{a, b} U[t, a] C_g[a, b] V[s, b]^T")
    'K_{t,s} = \\sum_{a, b} U_{t,a} C^{(g)}_{a,b} V_{s,b}^{\\top}'
    """
    text = re.sub(
        r"(\w+?)(?:_(\w))?\[([^\]]*)\]",
        lambda m: f"{m[1]}{f'^{{({m[2]})}}' if m[2] else ''}_{{{m[3].replace(', ', ',')}}}",
        formula,
    )
    text = re.sub(r"\bsum_", r"\\sum_", text).replace("(x)", r"\otimes ").replace("^T", r"^{\top}")
    return re.sub(r"([WA])_(\w{2,})", r"\1_{\\mathrm{\2}}", text)


def example_of(method: Method) -> tuple[str, nn.Module, tuple[int, ...]] | None:
    """The layer that a method is shown on: what it is, the layer, the shape of an input."""
    wanted = [EXAMPLE_OF[method.name]] if method.name in EXAMPLE_OF else list(EXAMPLES)
    for what in wanted:
        layer, shape = EXAMPLES[what]
        if not method.why_not(layer):
            return what, layer, shape
    return None


def ranks_at(method: Method, limits: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Ranks at one share of every limit, but for those that the method presets."""
    preset = method.preset or (None,) * len(limits)
    return tuple(
        min(given, limit) if given else max(1, round(share * limit))
        for given, limit in zip(preset, limits, strict=False)
    )


def within(price: Price, method: Method, limits: tuple[int, ...], share: float) -> tuple[int, ...] | None:
    """The largest ranks, all at one share of their limits, that need at most this share of the parameters."""
    steps = sorted({ranks_at(method, limits, step / 512) for step in range(1, 512)}, key=sum, reverse=True)
    fitting = (ranks for ranks in steps if price(ranks)["params"] <= share * price.dense["params"])
    return next(fitting, None)


def child_text(child: nn.Module) -> tuple[str, str]:
    """What a layer of a chain is, and its sizes."""
    if isinstance(child, nn.modules.conv._ConvNd):
        grouped = " in groups" if 1 < child.groups < child.in_channels else ""
        depthwise = " depthwise" if child.groups > 1 and child.groups == child.in_channels else ""
        kernel = " x ".join(map(str, child.kernel_size))
        return f"{kernel}{depthwise or grouped}", f"{child.in_channels} \N{RIGHTWARDS ARROW} {child.out_channels}"
    if isinstance(child, nn.Linear):
        return "Linear", f"{child.in_features} \N{RIGHTWARDS ARROW} {child.out_features}"
    if isinstance(child, nn.RNNBase) or hasattr(child, "hidden_size"):
        return type(child).__name__, f"{child.input_size} \N{RIGHTWARDS ARROW} {child.hidden_size}"
    return type(child).__name__, ""


def picture(layer: Factorized) -> str:
    """The chain as SVG: a box for each layer, with its role, what it is, its sizes and its parameters."""
    wide, high, gap = 148, 92, 34
    children = list(layer.named_children())
    width = len(children) * (wide + gap) + gap
    parts = []
    for place, (role, child) in enumerate(children):
        x = gap + place * (wide + gap)
        kind, sizes = child_text(child)
        params = sum(parameter.numel() for parameter in child.parameters())
        lines = (
            (20, role, "decomp-role"),
            (42, kind, ""),
            (61, sizes, ""),
            (80, f"{params:,} params", "decomp-muted"),
        )
        parts.append(f'<rect x="{x}" y="6" width="{wide}" height="{high}" rx="6"/>')
        parts += [
            f'<text x="{x + wide / 2}" y="{6 + y}" class="{style}">{escape(text)}</text>'
            for y, text, style in lines
            if text
        ]
        parts.append(f'<path d="M{x - gap + 3} {6 + high / 2}h{gap - 10}l-6 -4m6 4l-6 4"/>')
    end = gap + len(children) * (wide + gap)
    parts.append(f'<path d="M{end - gap + 3} {6 + high / 2}h{gap - 10}l-6 -4m6 4l-6 4"/>')
    label = escape(
        " then ".join(f"{role}: {child_text(child)[0]} {child_text(child)[1]}" for role, child in children)
    )
    return (
        f'<div class="decomp-chain"><svg viewBox="0 0 {width + 4} {high + 12}" width="{width + 4}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></div>'
    )


def errors_of(method: Method) -> str:
    if method.closed_form:
        return "known at all ranks from one decomposition, so that sliders and budgets are instant"
    return "fitted at each rank, which takes seconds for a layer of 256 channels"


def page(method: Method) -> str:
    """The page of one method in Markdown."""
    return "\n\n".join(_parts(method)) + "\n"


def _parts(method: Method) -> Iterator[str]:
    name, first = method.name, layers_of(method)[0]
    shown = example_of(method)
    layer = method.layer_of(shown[1]) if shown else first
    assert layer is not None
    yield f"# {name}"
    chain = re.sub(r"\s+", " ", text_of(layer).split("\n\n")[0])
    yield chain.replace("``", "`")
    yield from (f"$$ {latex(formula)} $$" for formula in formulas_of(method))
    yield "## In place of one layer"
    if shown:
        yield from _costs(method, *shown)
    ranks = ", ".join(f"`{each}`" for each in method.rank_names)
    takes = [what for what, probe in PROBES.items() if not method.why_not(probe)]
    yield "## In short"
    yield (
        "| | |\n|---|---|\n"
        f"| call | `{one_line_call(name)}` |\n"
        f"| ranks | {ranks} |\n"
        f"| works on | {'; '.join(takes)} |\n"
        f"| errors | {errors_of(method)} |\n"
        f"| layers | {', '.join(f'{{class}}`~decomp.layers.{each.__name__}`' for each in layers_of(method))} |\n"
        f"| source | {source_of(method)} |"
    )
    if (Path(__file__).parents[1] / "method_notes" / f"{name}.md").exists():
        yield f"```{{include}} ../method_notes/{name}.md\n```"
    yield "## The layers"
    for each in layers_of(method):
        yield f"```{{eval-rst}}\n.. autoclass:: decomp.layers.{each.__name__}\n```"


def _costs(method: Method, what: str, dense: nn.Module, shape: tuple[int, ...]) -> Iterator[str]:
    limits = method.limits(method.kernels(dense))
    layer: Any = method.layer_of(dense)
    price = Price(dense, layer, limits, [Call(shape)])
    found = {share: within(price, method, limits, share) for share in SHARES}
    rows = []
    for share, ranks in found.items():
        if ranks:
            shares = [price(ranks)[kind] / price.dense[kind] for kind in ("params", "macs")]
            shown = f"({', '.join(map(str, ranks))})" if len(ranks) > 1 else ranks[0]
            rows.append(f"| {share:g} | {shown} | {shares[0]:.3f} | {shares[1]:.3f} |")
    drawn = found[0.25] or found[0.5] or found[0.75] or ranks_at(method, limits, 0.25)
    yield f"On {what}, at {', '.join(f'{n} = {r}' for n, r in zip(method.rank_names, drawn, strict=False))}:"
    yield picture(layer.like(dense, drawn, device="meta"))
    if rows:
        head = "| within a share of the parameters of | ranks | parameters | MACs |\n|---|---|---|---|\n"
        yield "What such a layer costs, as shares of the dense one:"
        yield head + "\n".join(rows)


def table() -> str:
    """All methods: ranks, what they are for, the source."""
    rows = ["| method | ranks | chain of layers | source |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        shown = example_of(method)
        layer = (method.layer_of(shown[1]) if shown else None) or layers_of(method)[0]
        chain = re.split(
            r"[:;]|\.(?: |$)|, (?:then|of|the colour)? ?(?=with every)", re.sub(r"\s+", " ", text_of(layer))
        )[0]
        ranks = ", ".join(method.rank_names)
        rows.append(f"| [`{name}`]({name}.md) | {ranks} | {chain.replace('``', '`')} | {source_of(method)} |")
    return "\n".join(rows) + "\n"


def write(folder: Path) -> None:
    """Write the pages and the table, where they have changed."""
    folder.mkdir(exist_ok=True)
    texts = {f"{name}.md": page(method) for name, method in METHODS.items()} | {"_table.md": table()}
    for name, text in texts.items():
        target = folder / name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
    for left in folder.glob("*.md"):
        if left.name not in (*texts, "index.md"):
            left.unlink()


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "methods"))
    return {"parallel_read_safe": True}
