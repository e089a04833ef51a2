"""The losses against their formulas, written out in float64."""

import math

import pytest
import torch
from torch import nn

import decomp
from decomp import losses


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_soft_targets_are_those_of_hinton():
    student, teacher, t = numbers(3, 5), numbers(3, 5), 3.0
    expected = 0.0
    for row in range(3):
        p = [math.exp(v / t) for v in teacher[row].tolist()]
        q = [math.exp(v / t) for v in student[row].tolist()]
        expected += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True)) / 3
    assert float(losses.soft_targets(student, teacher, t)) == pytest.approx(t**2 * expected, rel=1e-12)


def test_soft_targets_keep_the_size_of_their_gradients():
    """At high temperature the gradient tends to (z - v) / N for centred logits: equation 4 of the paper."""
    student, teacher = numbers(1, 4), numbers(1, 4)
    student, teacher = (x - x.mean() for x in (student, teacher))
    student.requires_grad_()
    losses.soft_targets(student, teacher, 1e4).backward()
    assert torch.allclose(student.grad, (student.detach() - teacher) / 4, atol=1e-3)


def test_hints_and_attention_are_those_of_the_papers():
    student, teacher = numbers(2, 3, 2, 2), numbers(2, 3, 2, 2)
    expected = sum(float(a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)) / 2 / 2
    assert float(losses.hint(student, teacher)) == pytest.approx(expected, rel=1e-12)
    expected = 0.0
    for example in range(2):
        maps = []
        for feature in (student, teacher):
            q = [sum(float(feature[example, c, i, j]) ** 2 for c in range(3)) for i in range(2) for j in range(2)]
            norm = math.sqrt(sum(value**2 for value in q))
            maps.append([value / norm for value in q])
        expected += math.sqrt(sum((a - b) ** 2 for a, b in zip(*maps, strict=True))) / 2 / 2
    assert float(losses.attention_transfer(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_distillation_is_the_weighted_sum_in_one_pass():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.fc, self.calls = (
                nn.Conv2d(2, 3, 1),
                nn.ReLU(inplace=True),
                nn.Linear(3, 4),
                0,
            )

        def forward(self, x):
            self.calls += 1
            return {"logits": self.fc(self.act(self.conv(x)).mean((2, 3)))}

    small, dense = Net().double(), Net().double()
    batch = (numbers(5, 2, 3, 3), torch.tensor([0, 1, 2, 3, 0]))
    loss = losses.Distillation(
        dense,
        temperature=2.0,
        soft=0.7,
        hard=0.3,
        hints={"conv": 0.1},
        attention={"conv": 0.2},
        inputs=lambda batch: batch[0],
    )
    value = loss(small, batch)
    assert (small.calls, dense.calls, dense.training) == (1, 1, True)
    with torch.no_grad():
        ours, theirs = small.conv(batch[0]), dense.conv(batch[0])
        expected = (
            0.7 * losses.soft_targets(small(batch[0])["logits"], dense(batch[0])["logits"], 2.0)
            + 0.3 * losses.cross_entropy(small, batch)
            + 0.1 * losses.hint(ours, theirs)
            + 0.2 * losses.attention_transfer(ours, theirs)
        )
    assert torch.allclose(value.detach(), expected, rtol=1e-12)
    value.backward()
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_what_a_loss_cannot_use_is_named():
    net = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"\(inputs, labels\), not a Tensor"):
        decomp.losses.cross_entropy(net, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="Linear has no layer 'conv9'"):
        losses.Distillation(net, hints={"conv9": 1.0})(net, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="every weight of the distillation is 0"):
        losses.Distillation(net, soft=0)(net, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="temperature=0"):
        losses.Distillation(net, temperature=0)
    with pytest.raises(TypeError, match="a str without logits"):
        losses.logits_of("x")


@pytest.mark.parametrize(("hints", "count"), [({}, 0), ({"0": 1.0}, 1)])
def test_a_function_mode_runs_only_where_features_are_compared(hints, count):
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append(torch.overrides._get_current_function_mode_stack())
            return super().forward(x)

    dense, small = (nn.Sequential(Watching(4, 4), nn.Linear(4, 3)).eval() for _ in range(2))
    losses.Distillation(dense, hints=hints)(small, torch.randn(2, 4))
    assert [len(stack) for stack in seen] == [count, count]
