"""Does biclustering pay (Denton et al. 2014, section 3.2)? Relative weight errors at equal parameters.

Input and output channels are put into clusters by k-means (equal sizes, as grouped convolutions need), and every
block of clusters is decomposed by itself, once as a matrix (T/H x S k^2 / G, what the paper calls SVD) and once by
Tucker-2. Compared with the channel SVD and the Tucker-2 of the whole kernel with at least as few parameters. The
trained convolutions of the network that reads digits, 3 seeds, and their ranks at a quarter of the parameters.

    python benchmarks/biclustering.py
"""

import statistics

import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import decomp
from decomp._util.tables import render
from decomp.digits import load_digits, train
from decomp.methods import METHODS

SHARE = 0.25
CLUSTERS = (2, 4)


def clusters(vectors: Tensor, count: int) -> list[Tensor]:
    """k-means into clusters of equal size: centres by Lloyd, then the assignment of least total distance."""
    points = vectors.double().numpy()
    centres, _ = kmeans2(points, count, minit="++", seed=0)
    size = len(points) // count
    distances = ((points[:, None] - centres[None]) ** 2).sum(-1).repeat(size, axis=1)
    _, columns = linear_sum_assignment(distances)
    found = torch.as_tensor(columns // size)
    return [torch.where(found == each)[0] for each in range(count)]


def blockwise(kernel: Tensor, method: str, count: int, budget: float) -> float:
    """Relative error of the blocks, all with the ranks of one share that keeps the budget."""
    rows = clusters(kernel.flatten(1), count)
    columns = clusters(kernel.transpose(0, 1).flatten(1), count)
    blocks = [kernel[row][:, column] for row in rows for column in columns]
    errors = []
    for block in blocks:
        dense = nn.Conv2d(block.shape[1], block.shape[0], block.shape[2:], bias=False)
        dense.weight.data = block
        bound = budget / len(blocks) / block.numel()
        choice = decomp.plan(dense, METHODS[method], ranks=decomp.ranks.params(min(bound, 0.999)))[""]
        errors.append((choice.error if choice.ranks else 1.0) ** 2 * float(block.square().sum()))
    return (sum(errors) / float(kernel.square().sum())) ** 0.5


def main() -> None:
    digits = load_digits()
    table: dict[str, list[float]] = {}
    for seed in range(3):
        model = train(digits, seed=seed, progress=False)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.in_channels >= 16:
                kernel = layer.weight.detach()
                for method in ("svd_channel", "tucker"):
                    whole = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, bias=False)
                    whole.weight.data = kernel
                    plan = decomp.plan(whole, METHODS[method], ranks=decomp.ranks.params(SHARE))
                    table.setdefault(f"{method}, whole kernel", []).append(plan[""].error)
                    for count in CLUSTERS:
                        name = f"{method}, {count} x {count} clusters"
                        table.setdefault(name, []).append(blockwise(kernel, method, count, SHARE * kernel.numel()))
    rows = [
        (name, f"{statistics.mean(errors):.3f}", f"{statistics.median(errors):.3f}")
        for name, errors in table.items()
    ]
    print(render(f"relative weight error at {SHARE} of the parameters", ("method", ">mean", ">median"), rows))


if __name__ == "__main__":
    main()
