"""A network that is not a toy."""

import torch
from memory import PeakMemory
from networks import plant_spectra, resnet50

import decomp


def test_resnet50_is_planned_and_applied_within_one_and_a_half_times_its_parameters():
    model = plant_spectra(resnet50()).eval()
    parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with PeakMemory(*model.parameters(), *model.buffers()) as memory:
        plan = decomp.plan(model, "tucker", decomp.ranks.vbmf(pure=True), progress=False)
        small = plan.apply(model, progress=False)
    result_bytes = sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
    assert memory.peak_bytes - result_bytes < 1.5 * parameter_bytes
    assert memory.peak_bytes > result_bytes, "the tensors of the result themselves must have been seen"
    replaced = [choice for choice in plan.values() if choice.ranks]
    assert len(replaced) >= 50
    assert plan.params.after < 0.5 * plan.params.before
    with torch.no_grad():
        assert small(torch.randn(1, 3, 64, 64)).isfinite().all()
