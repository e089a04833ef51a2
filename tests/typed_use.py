"""What a type checker must see of the calls; mypy reads this file, nothing runs it."""

from typing import assert_type

from torch import Tensor, nn

import decomp
from decomp.planning.choice import Change, Choice
from decomp.planning.plan import CompressedModule


def use(model: nn.Module, image: Tensor, batches: list[Tensor]) -> None:
    small = decomp.tucker(model, ranks={"conv*": (16, 8), "fc": decomp.ranks.energy(0.9)}, layers=nn.Conv2d)
    assert_type(small, CompressedModule)
    assert_type(small.decomp_plan, decomp.Plan)
    assert_type(small.decomp_plan["conv1"], Choice)
    assert_type(small.decomp_plan.macs, Change | None)
    assert_type(decomp.plan(model, macs=0.5, example_inputs=image), decomp.Plan)
    decomp.compress(
        model, image, bytes=0.25, multiple_of=8, data=batches, finetune={"steps": 100}, sequential=True
    )
    decomp.cp(model, ranks=small.decomp_plan, modes=4)
    decomp.svd(model, ranks=lambda candidate: (candidate.limits[0] // 2,), exclude=("head.*", nn.Embedding))
    small.decomp_plan.with_budget(params=0.3, objective="sum").apply(model)
    decomp.save(small, "small.safetensors", constructor=nn.Linear, arguments={"in_features": 8})
    assert_type(decomp.load("small.safetensors", model, device="cpu"), CompressedModule)
    assert_type(decomp.load("small.safetensors", allow=[nn.Linear, "a.b"]), CompressedModule)
    decomp.tucker(model, layer="*")  # type: ignore[call-arg]
    decomp.compress(model, macs="half")  # type: ignore[arg-type]
    decomp.plan(model, multiple_of="8")  # type: ignore[arg-type]
