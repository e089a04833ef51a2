"""Profiles and comparisons: the counts are right, the layers are the user's, nothing is changed."""

import pytest
import torch
from networks import plant_spectra
from torch import nn

import decomp
from decomp._util.tables import milliseconds, number


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv, self.bn = nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        y = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
        y = self.fc(self.fc(self.attention(y, y, y)[0]))
        return y @ y.transpose(1, 2) * self.scale


@pytest.fixture
def net():
    return plant_spectra(Net())


IMAGE = torch.randn(2, 8, 6, 6)


def test_counts_per_layer_and_in_total(net):
    report = decomp.profile(net, IMAGE)
    assert list(report.rows) == ["conv", "bn", "attention", "fc", "(elsewhere)"]
    assert report.rows["conv"].macs == 2 * 16 * 32 * 8 * 9
    assert report.rows["conv"].params == 32 * 8 * 9 + 32
    assert report.rows["fc"].macs == 2 * 2 * 16 * 32 * 32, "a layer that is called twice costs twice"
    assert report.rows["attention"].macs == 2 * (4 * 16 * 32 * 32 + 2 * 16 * 16 * 32)
    assert report.rows["(elsewhere)"].macs == 2 * 16 * 16 * 32
    assert report.rows["(elsewhere)"].params == 1
    assert report.rows["(elsewhere)"].bytes == 4
    assert report.total.bytes == sum(row.bytes for row in report.rows.values())
    assert report.total.macs == sum(row.macs for row in report.rows.values())
    assert report.total.params == sum(parameter.numel() for parameter in net.parameters())
    state = [*net.parameters(), *net.buffers()]
    assert report.total.bytes == sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert report.total.seconds > 0
    assert all(row.seconds > 0 for name, row in report.rows.items() if name != "(elsewhere)")
    assert "whole model" in str(report)


def test_comparison_shows_what_was_replaced_and_the_ratios(net):
    small = decomp.tucker(net, ranks=6)
    comparison = decomp.compare(small, net, IMAGE, evaluate=lambda model: float(model is net))
    assert comparison.scores == (0.0, 1.0)
    assert comparison.ratio("params") == comparison.dense.total.params / comparison.small.total.params > 1
    assert comparison.ratio("macs") > 1
    text = str(comparison)
    assert "TuckerConv (6, 6)" in text
    assert "BatchNorm2d" not in text
    assert "score 1.0000 => 0.0000" in text
    with pytest.raises(ValueError, match=r"compare\(small, dense, example_inputs\)"):
        decomp.compare(net, small, IMAGE)


def test_a_batch_that_does_not_fit_says_so(net):
    with pytest.raises(TypeError, match="Net cannot be called with a batch of 2 elements"):
        decomp.profile(net, (IMAGE, IMAGE))
    with pytest.raises(TypeError, match="a batch must be a tensor"):
        decomp.profile(net, 3)


def test_numbers_have_three_digits_and_a_unit():
    assert [number(v) for v in (0, 999, 1000, 12_345, 999_600, 1e9)] == [
        "0",
        "999",
        "1.00 k",
        "12.3 k",
        "1.00 M",
        "1.00 G",
    ]
    assert [milliseconds(v) for v in (0.0001234, 0.01234, 1.234)] == ["0.123 ms", "12.3 ms", "1.23e+03 ms"]


def test_attention_of_a_hugging_face_model_is_counted():
    """Against the closed form: torch's counter leaves out the attention kernel of the CPU."""
    from transformers import BertConfig, BertModel

    width, inner, length = 32, 64, 7
    config = BertConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=inner
    )
    report = decomp.profile(BertModel(config), {"input_ids": torch.zeros(2, length, dtype=torch.long)})
    attention = 2 * length * length * width
    layer = length * (4 * width * width + 2 * width * inner) + attention
    assert report.total.macs == 2 * (2 * layer + width * width)


def test_bytes_outside_of_any_layer_are_those_of_parameters_and_buffers_once():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("table", torch.zeros(5, 8, dtype=torch.float64))
            self.tied = self.fc.weight  # counts with the layer

        def forward(self, x):
            return self.fc(x + self.table[0].float())

    report = decomp.profile(Positions(), torch.zeros(1, 8))
    assert report.rows["(elsewhere)"].bytes == 5 * 8 * 8
    assert report.total.bytes == sum(row.bytes for row in report.rows.values())
