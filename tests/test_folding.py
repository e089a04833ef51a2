"""BatchNorm folded into the layer in front of it: the same output, and only where nothing else sees the layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import decomp
from decomp.network.tracing import tails

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CASES = [
    (nn.Conv1d, 1, {"groups": 2}),
    (nn.Conv1d, 1, {"padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, 2, {"bias": False}),
    (nn.Conv2d, 2, {"stride": 2, "padding": 1, "groups": 4}),
    (nn.Conv3d, 3, {}),
    (nn.ConvTranspose1d, 1, {"bias": False}),
    (nn.ConvTranspose1d, 1, {"groups": 4}),
    (nn.ConvTranspose2d, 2, {"stride": 2, "output_padding": 1}),
    (nn.ConvTranspose2d, 2, {"groups": 2, "bias": False}),
    (nn.ConvTranspose3d, 3, {"groups": 2}),
]


def lively(model):
    """Statistics and scales as training leaves them; some scales negative, one zero."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
                with torch.no_grad():
                    norm.weight[0] = 0
    return model.eval()


def left(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "axes", "options"), CASES)
def test_the_folded_layer_gives_what_the_two_gave(kind, axes, options, affine):
    layer, norm = kind(8, 12, 3, **options), NORMS[axes](12, affine=affine)
    model = lively(nn.Sequential(layer, norm, nn.ReLU(inplace=True)).double())
    x = torch.randn(3, 8, *(6,) * axes, dtype=torch.float64)
    given = copy.deepcopy(model.state_dict())
    folded = decomp.fold_batch_norm(model, x)
    assert type(folded[0]) is kind
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(given.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias, affine):
    model = lively(nn.Sequential(nn.Linear(6, 12, bias=bias), nn.BatchNorm1d(12, affine=affine)).double())
    x = torch.randn(5, 6, dtype=torch.float64)
    folded = decomp.fold_batch_norm(model, x)
    assert not left(folded)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        return self.bn2(y) + y


def test_a_residual_network_is_folded_where_nothing_else_sees_the_layer():
    model = lively(Residual().double())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    folded = decomp.fold_batch_norm(model, x)
    assert left(folded) == ["bn2"]
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)


class Wired(nn.Module):
    """A layer and its norm, put together by a function."""

    def __init__(self, forward, layer=None, norm=None):
        super().__init__()
        self.layer, self.norm, self._forward = layer or nn.Conv1d(4, 4, 1), norm or nn.BatchNorm1d(4), forward

    def forward(self, x):
        return self._forward(self, x)


def written_over(self, x):
    y = self.layer(x)
    y[:, 0] = 0
    return self.norm(y)


def returned(self, x):
    y = self.layer(x)
    return self.norm(y), {"before": y}


WIRINGS = {
    "another use": lambda self, x: self.norm(y := self.layer(x)) + y.mean(),
    "returned as well": returned,
    "shared norm": lambda self, x: self.norm(self.layer(x)) + self.norm(x),
    "called twice": lambda self, x: self.norm(self.layer(self.layer(x))),
    "in place between": lambda self, x: self.norm(self.layer(x).relu_()),
    "added in place between": lambda self, x: self.norm(self.layer(x).add_(1)),
    "written over between": written_over,
    "weight read": lambda self, x: self.norm(self.layer(x)) + functional.conv1d(x, self.layer.weight),
    "weight of the norm read": lambda self, x: self.norm(self.layer(x)) * torch.relu(self.norm.weight)[:, None],
    "the other way round": lambda self, x: self.layer(self.norm(x)),
}


@pytest.mark.parametrize("forward", WIRINGS.values(), ids=WIRINGS)
def test_what_is_not_folded(forward):
    model = lively(Wired(forward))
    with pytest.raises(ValueError, match="no BatchNorm directly follows a layer"):
        decomp.fold_batch_norm(model, torch.randn(2, 4, 4))


@pytest.mark.parametrize("inplace", [True, False])
def test_what_the_model_returns_ends_a_tail_unless_it_is_its_end(inplace):
    def last(self, x):
        return functional.relu(self.norm(self.layer(x)), inplace=inplace)

    def before_last(self, x):
        y = self.norm(self.layer(x))
        return torch.relu(y), y

    for forward, length in ((last, 2), (before_last, 1)):
        model = lively(Wired(forward))
        assert len(tails(model, torch.randn(2, 4, 4), {"layer": model.layer})["layer"].steps) == length
        assert not left(decomp.fold_batch_norm(model, torch.randn(2, 4, 4)))


def test_a_norm_of_another_axis_is_not_that_of_the_channels():
    def plain(self, x):
        return self.norm(self.layer(x))

    model = lively(Wired(plain, nn.Linear(6, 4)))
    assert not left(decomp.fold_batch_norm(model, torch.randn(3, 6)))
    with pytest.raises(ValueError, match="no BatchNorm directly follows"):
        decomp.fold_batch_norm(model, torch.randn(3, 4, 6))
    without = Wired(plain, norm=nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="no BatchNorm directly follows"):
        decomp.fold_batch_norm(without, torch.randn(3, 4, 6))


class Doubled(nn.Conv1d):
    def forward(self, x):
        return super().forward(2 * x)


class Louder(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(model, part):
    getattr(model, part).register_forward_hook(lambda module, given, result: None)
    return model


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: hooked(model, "layer"), "has hooks"),
        (lambda model: hooked(model, "norm"), "has hooks"),
        (lambda model: parametrizations.weight_norm(model.layer), "parametrized"),
        (lambda model: setattr(model, "twin", tied(nn.Conv1d(4, 4, 1), model.layer)), "tied"),
        (lambda model: setattr(model, "twin", tied(nn.BatchNorm1d(4), model.norm)), "tied"),
        (lambda model: setattr(model, "layer", Doubled(4, 4, 1)), "Doubled or BatchNorm1d is a subclass"),
        (lambda model: setattr(model, "norm", Louder(4)), "Louder is a subclass of torch's layer"),
    ],
)
def test_what_a_swap_would_break_is_left_alone_and_said(spoil, reason):
    model = Wired(lambda self, x: self.norm(self.layer(x)))
    spoil(model)
    with pytest.raises(ValueError, match=rf"'layer' stays: .*{reason}"):
        decomp.fold_batch_norm(lively(model), torch.randn(2, 4, 4))


def tied(module, other):
    module.weight = other.weight
    return module


def test_flags_dtype_and_memory_format_are_kept():
    layer = nn.Conv2d(8, 12, 3, bias=False).requires_grad_(False)
    model = nn.Sequential(layer, nn.BatchNorm2d(12), nn.ReLU()).to(torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)
    model[1].train(False)
    folded = decomp.fold_batch_norm(model, torch.randn(2, 8, 6, 6, dtype=torch.bfloat16))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (folded[0].weight.dtype, folded[0].bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (folded[0].weight.requires_grad, folded[0].bias.requires_grad) == (False, True)
    assert [module.training for module in folded] == [True, False, True]


def test_which_layers():
    model = lively(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)))
    x = torch.randn(2, 4, 4)
    assert left(decomp.fold_batch_norm(model, x, layers="2")) == ["1"]
    assert left(decomp.fold_batch_norm(model, {"input": x}, exclude="2")) == ["3"]
    with pytest.raises(ValueError, match=r"layers='head' matches no layer"):
        decomp.fold_batch_norm(model, x, layers="head")
    expected = model(x)
    assert decomp.fold_batch_norm(model, x, inplace=True) is model
    assert not left(model)
    torch.testing.assert_close(model(x), expected)


def test_the_error_of_the_weight_sees_the_scale_of_the_norm():
    """One output is scaled up a thousand times: a folded layer of rank 1 keeps it, an unfolded one need not."""
    model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.BatchNorm1d(12)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.arange(12.0, 0, -1)))
        model[1].weight[7] = 1000
    x = torch.randn(64, 12)

    def error(small):
        return float((small(x) - model(x)).detach().norm() / model(x).detach().norm())

    assert error(decomp.svd(decomp.fold_batch_norm(model, x), ranks=1)) < 0.05
    assert error(decomp.svd(model, ranks=1)) > 0.9
