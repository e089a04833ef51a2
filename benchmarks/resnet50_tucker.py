"""Plan and apply Tucker-2 with vbmf ranks on a ResNet-50-shaped network: seconds and peak memory.

The weights get a planted power-law spectrum (seeded): random ones are noise to vbmf and would stay dense.

    python benchmarks/resnet50_tucker.py
"""

import statistics
import time

import torch
from memory import PeakMemory
from networks import plant_spectra, resnet50

import decomp
from decomp._util.tables import number, render

RUNS = 3


def main() -> None:
    model = plant_spectra(resnet50(), seed=0).eval()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    bytes_before = sum(p.numel() * p.element_size() for p in model.parameters())
    seconds: dict[str, list[float]] = {"plan": [], "plan again (ranks changed)": [], "apply": []}
    for _ in range(RUNS):
        start = time.perf_counter()
        plan = decomp.plan(model, "tucker", decomp.ranks.vbmf(pure=True), example_inputs=image, progress=False)
        planned = time.perf_counter()
        plan.with_ranks("*", decomp.ranks.energy(0.9, pure=True))
        edited = time.perf_counter()
        small = plan.apply(model, progress=False)
        applied = time.perf_counter()
        for step, spent in zip(seconds, (planned - start, edited - planned, applied - edited), strict=True):
            seconds[step].append(spent)
    with PeakMemory(*model.parameters(), *model.buffers()) as memory:
        result = decomp.plan(model, "tucker", decomp.ranks.vbmf(pure=True), progress=False).apply(
            model, progress=False
        )
    tensors = (*result.parameters(), *result.buffers())
    result_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    print(plan)
    rows = [(step, f"{statistics.median(times):.2f}") for step, times in seconds.items()]
    print(render(f"\nmedian of {RUNS} runs, {torch.get_num_threads()} threads", ("step", ">seconds"), rows))
    share = (memory.peak_bytes - result_bytes) / bytes_before
    print(f"\npeak tensor memory above the model, without the result: {share:.2f} x the parameters' ", end="")
    print(f"{number(bytes_before)}B\n")
    print(decomp.compare(small, model, image))


if __name__ == "__main__":
    main()
