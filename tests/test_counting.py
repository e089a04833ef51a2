"""MACs of operators that torch's counter leaves out, against what a loop over their products adds up."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import decomp
from decomp.network.flops import MacCounter


def counted(call):
    with MacCounter() as counter, torch.no_grad():
        call()
    return counter.macs, dict(counter.uncounted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("layers", "both_ways"), [(1, False), (2, True), (3, False)])
def test_recurrent_layers_apply_both_weights_at_every_step(kind, layers, both_ways, dtype):
    layer = kind(8, 16, layers, bidirectional=both_ways, dtype=dtype)
    weights = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("weight"))
    assert counted(lambda: layer(torch.randn(5, 3, 8, dtype=dtype))) == (5 * 3 * weights, {})


def test_packed_sequences_count_their_own_steps():
    layer = nn.LSTM(8, 16)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 8), [5, 4, 2])
    assert counted(lambda: layer(packed)) == ((5 + 4 + 2) * 4 * 16 * (8 + 16), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_count_every_row_once(dtype):
    rows, experts = torch.randn(16, 32, dtype=dtype), torch.randn(4, 32, 48, dtype=dtype)
    ends = torch.tensor([4, 4, 12, 16], dtype=torch.int32)
    assert counted(lambda: torch._grouped_mm(rows, experts, offs=ends)) == (16 * 32 * 48, {})
    batch = torch.randn(4, 16, 32).to(dtype)
    assert counted(lambda: torch._grouped_mm(batch, experts)) == (4 * 16 * 32 * 48, {})
    columns = torch.tensor([16, 16, 32, 48], dtype=torch.int32)
    assert counted(lambda: torch._grouped_mm(batch, experts[0], offs=columns)) == (16 * 32 * 48, {})
    inner = torch.tensor([8, 16, 24, 32], dtype=torch.int32)
    assert counted(lambda: torch._grouped_mm(rows, experts[0], offs=inner)) == (16 * 32 * 48, {})


def test_attention_bilinear_and_vectors():
    query = torch.randn(2, 4, 10, 8)
    attention = 2 * (2 * 4) * 10 * 10 * 8
    assert counted(lambda: functional.scaled_dot_product_attention(query, query, query)) == (attention, {})
    bilinear = nn.Bilinear(8, 6, 5)
    assert counted(lambda: bilinear(torch.randn(3, 8), torch.randn(3, 6))) == (3 * 5 * (8 * 6 + 8), {})
    matrix, vector = torch.randn(7, 5), torch.randn(5)
    assert counted(lambda: (matrix @ vector, vector @ vector)) == (7 * 5 + 5, {})
    assert counted(lambda: torch.addmv(torch.randn(7), matrix, vector)) == (7 * 5, {})
    one_hot = functional.one_hot(torch.tensor([1, 3, 2]), 5).float()
    assert counted(lambda: one_hot @ torch.randn(5, 4)) == (3 * 5 * 4, {})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_attention_is_four_projections_and_two_products(batch_first, bias):
    layer = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first).eval()
    x = torch.randn(5, 3, 8)
    length, batch = (3, 5) if batch_first else (5, 3)
    expected = 4 * 15 * 8 * 8 + 2 * batch * length * length * 8
    macs = decomp.profile(nn.ModuleDict({"a": layer})["a"], (x, x, x)).total.macs
    assert macs == expected


class Transformed(nn.Module):
    """An operator that multiplies and that nobody has a formula for, beside a layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return torch.fft.fft(self.fc(x)).real


def test_what_is_not_counted_is_named():
    model, x = Transformed(), torch.randn(2, 64)
    assert counted(lambda: model(x)) == (2 * 64 * 64, {"aten._fft_r2c": 1})
    assert "not counted: aten._fft_r2c (1 call)" in str(decomp.profile(model, x))
    plan = decomp.plan(model, macs=0.5, example_inputs=x)
    assert "not counted: aten._fft_r2c (1 call)" in str(plan)
    again = decomp.Plan.from_json(plan.to_json())
    assert again.uncounted == plan.uncounted == {"aten._fft_r2c": 1}
    assert "not counted" in decomp.compare(plan.apply(model), model, x).summary


def test_names_that_only_contain_the_name_of_a_product_are_no_products():
    images = torch.rand(1, 2, 4, 4)
    assert counted(lambda: nn.functional.interpolate(images.lgamma(), scale_factor=2, mode="bilinear")) == (0, {})
    assert counted(lambda: torch.vdot(images.flatten(), images.flatten())) == (0, {"aten.vdot": 1})


class Sliced(nn.Module):
    """Gives a view of a parameter to a module, as DeBERTa does."""

    def __init__(self):
        super().__init__()
        self.q, self.l = nn.Parameter(torch.randn(64, 32)), nn.Linear(32, 32)

    def forward(self, x):
        return self.l(x) + self.l(self.q[:32]).sum()


def test_a_view_of_a_parameter_may_be_an_argument_of_a_module():
    model, x = Sliced(), torch.randn(4, 32)
    assert decomp.profile(model, x).total.macs == (4 + 32) * 32 * 32
    assert decomp.plan(model, ranks=4, example_inputs=x)["l"].macs.after == (4 + 32) * 2 * 32 * 4


class Reading(nn.Module):
    """Multiplies by a weight that it reads, as swin's attention does: its layer is never called."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(functional.linear(x, self.qkv.weight, self.qkv.bias))


def test_a_layer_that_is_read_and_never_called_says_so():
    plan = decomp.plan(Reading(), ranks=4, example_inputs=torch.randn(2, 64))
    assert plan["qkv"].reason.startswith("the model reads its weight and never calls it: factors would")
    assert plan["out"].ranks == (4,)


def test_more_is_not_called_fewer():
    dense = Reading()
    small = decomp.tucker(dense, ranks=30, layers="qkv", progress=False)
    summary = decomp.compare(small, dense, torch.randn(2, 64)).summary
    assert "x fewer params" in summary
    assert "x more MACs" in summary
