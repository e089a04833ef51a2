"""Networks of several families, small and random: exact at planted ranks, right counts, or a clear refusal."""

import pytest
import torch
from planting import RANK, plant
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    SwinConfig,
    SwinForImageClassification,
    VitsConfig,
    VitsModel,
)

import decomp
from decomp.layers import Factorized


def deberta():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return DebertaV2Model(DebertaV2Config(vocab_size=60, max_position_embeddings=32, **sizes, **relative))


def swin():
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return SwinForImageClassification(SwinConfig(window_size=4, num_labels=5, **sizes))


def vits():
    blocks = {"prior_encoder_num_flows": 2, "prior_encoder_num_wavenet_layers": 2, "depth_separable_num_layers": 2}
    blocks |= {"posterior_encoder_num_wavenet_layers": 2, "duration_predictor_num_flows": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "flow_size": 32}
    vocoder = {"upsample_initial_channel": 64, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8]}
    vocoder |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "spectrogram_bins": 33}
    return VitsModel(VitsConfig(vocab_size=40, **blocks, **sizes, **vocoder)).eval()


TOKENS = {"input_ids": torch.arange(20).reshape(2, 10) + 3}
IMAGE = {"pixel_values": torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


def linear_macs(small, batch):
    """Saved MACs of every factorized linear layer from the rows that reach it: rows (T S - r (T + S))."""
    saved = []

    def hook(layer, received, output):
        (rank,), (outputs, inputs) = layer.ranks, layer.dense_shape
        saved.append(received[0].numel() // inputs * (outputs * inputs - rank * (outputs + inputs)))

    for module in small.modules():
        if isinstance(module, Factorized):
            module.register_forward_hook(hook)
    small(**batch)
    return sum(saved)


@pytest.mark.parametrize(
    ("make", "batch", "output", "fewest"),
    [(deberta, TOKENS, "last_hidden_state", 12), (swin, IMAGE, "logits", 20)],
    ids=["deberta", "swin"],
)
def test_a_transformer_is_exact_at_the_ranks_of_its_weights(make, batch, output, fewest):
    model = plant(make())
    small = decomp.svd(model, ranks=RANK, example_inputs=batch, exclude=lambda _, m: isinstance(m, nn.Conv2d))
    layers = [module for module in small.modules() if isinstance(module, Factorized)]
    assert len(layers) >= fewest
    expected = getattr(model(**batch), output)
    torch.testing.assert_close(getattr(small(**batch), output), expected, rtol=1e-9, atol=1e-9)
    macs = small.decomp_plan.macs
    comparison = decomp.compare(small, model, batch)
    assert comparison.ratio("macs") == macs.before / macs.after > 1
    assert macs.before - macs.after == linear_macs(small, batch)
    assert small.decomp_plan.params.after == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize("method", ["svd", "tucker"])
def test_a_network_with_random_lengths_is_compressed(method):
    model = vits()
    batch = {"input_ids": torch.arange(12)[None] + 1}
    small = decomp.plan(model, method, RANK, example_inputs=batch).apply(model)
    plan = small.decomp_plan
    assert not any("ParametrizationList" in choice.layer for choice in plan.values())
    assert "remove_parametrizations" in plan["flow.flows.0.wavenet.in_layers.0"].reason
    assert sum(bool(choice.ranks) for choice in plan.values()) > 20
    wave = small(**batch).waveform
    assert wave.shape[0] == 1
    assert torch.isfinite(wave).all()
    assert plan.params.after == sum(parameter.numel() for parameter in small.parameters())
    assert plan.macs.after < plan.macs.before


def test_the_error_of_an_output_of_random_length_is_refused():
    model = vits()
    batch = {"input_ids": torch.arange(12)[None] + 1}
    small = decomp.svd(model, ranks=RANK)
    with pytest.raises(ValueError, match="VitsModel gives outputs of different sizes for the same batch"):
        decomp.sensitivity(model, [batch], progress=False)
    with pytest.raises(ValueError, match="different sizes for the same batch"):
        decomp.repair(small, model, [batch, batch], progress=False)
    with pytest.raises(ValueError, match=r"different sizes.*evaluate="):
        decomp.tradeoff(model, batch, methods=["svd_channel"], budgets=[0.8], progress=False)
    scored = decomp.tradeoff(
        model, batch, methods=["svd_channel"], budgets=[0.8], evaluate=lambda m: 1.0, progress=False
    )
    assert len(scored.points) == 1
