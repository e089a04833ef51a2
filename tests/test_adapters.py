"""Adapters of peft: they stay as they are, and they find the factorized layers of a compressed model."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import decomp
import decomp.adapters
from decomp.layers import SVDLinear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that peft imports
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BATCH = {"input_ids": torch.arange(24).reshape(2, 12) + 3}


def bert():
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return BertModel(BertConfig(vocab_size=120, max_position_embeddings=32, **sizes)).eval()


def gpt2():
    sizes = {"vocab_size": 120, "n_positions": 16, "n_embd": 48, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)).eval()


def lora(**options):
    return peft.LoraConfig(**{"target_modules": ["query", "value"], "r": 4, **options})


def accepted(**options):
    return decomp.adapters.accept_factorized(lora(**options))


def output(model):
    return model(**BATCH)[0].detach()


def train_randomly(model):
    """Give the adapters values, as training would: new ones are zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)


def trainable(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_adapters_and_the_layers_under_them_stay_dense():
    model = peft.get_peft_model(bert(), lora()).eval()
    assert len(trainable(model)) == 8
    small = decomp.svd(model, ranks=8, example_inputs=BATCH)
    assert trainable(small) == trainable(model)
    for name, choice in small.decomp_plan.items():
        if ".lora_" in name:
            assert "part of an adapter" in choice.reason
        elif name.endswith("base_layer"):
            assert "merge_and_unload" in choice.reason
    attention = small.base_model.model.encoder.layer[0].attention
    assert isinstance(attention.self.key, SVDLinear)
    assert not isinstance(attention.self.query.base_layer, SVDLinear)
    train_randomly(small)
    before = output(small)
    torch.testing.assert_close(output(small.merge_and_unload()), before, rtol=1e-5, atol=1e-5)


def test_adapters_of_other_libraries_are_known_by_their_parts():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.lora_a, self.lora_b = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 64)

    plan = decomp.plan(nn.Sequential(Adapted(), nn.Linear(64, 64)), ranks=4)
    assert [name for name, choice in plan.items() if choice.ranks] == ["1"]
    assert "part of an adapter" in plan["0.lora_a"].reason


def test_a_merged_model_is_decomposed_as_one_without_adapters():
    model = peft.get_peft_model(bert(), lora()).eval()
    train_randomly(model)
    merged = model.merge_and_unload()
    small = decomp.svd(merged, ranks=8, example_inputs=BATCH)
    assert isinstance(small.encoder.layer[0].attention.self.query, SVDLinear)
    expected = decomp.svd(copy.deepcopy(merged), ranks=8)
    torch.testing.assert_close(output(small), output(expected))


@pytest.mark.parametrize(("make", "targets"), [(bert, ["query", "value"]), (gpt2, ["c_attn"])])
def test_an_adapter_finds_a_factorized_layer_by_its_dense_name_and_merges_exactly(make, targets):
    small = decomp.svd(make(), ranks=8)
    before = output(small)
    model = peft.get_peft_model(small, accepted(target_modules=targets)).eval()
    assert trainable(model)
    assert all(".lora_" in name for name in trainable(model))
    torch.testing.assert_close(output(model), before)
    train_randomly(model)
    adapted = output(model)
    assert (adapted - before).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(output(model), before)
    merged = model.merge_and_unload()
    layers = [m for n, m in merged.named_modules() if n.split(".")[-1] in targets]
    assert layers
    assert {layer.ranks for layer in layers} == {(12,)}
    torch.testing.assert_close(output(merged), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "targets"), [(bert, ["query"]), (gpt2, ["c_attn"])])
def test_merging_makes_the_layer_dense_where_that_is_no_more_expensive(make, targets):
    model = peft.get_peft_model(decomp.svd(make(), ranks=8), accepted(target_modules=targets, r=64)).eval()
    model.add_adapter("second", accepted(target_modules=targets))
    model.base_model.set_adapter(["default", "second"])
    train_randomly(model)
    adapted = output(model)
    merged = model.merge_and_unload()
    kinds = {type(m) for n, m in merged.named_modules() if n.split(".")[-1] in targets}
    assert kinds == {
        type(dict(make().named_modules())[n]) for n, _ in merged.named_modules() if n.endswith(targets[0])
    }
    torch.testing.assert_close(output(merged), adapted, rtol=1e-4, atol=1e-4)


def test_taking_adapters_off_gives_the_compressed_model_back():
    small = decomp.svd(bert(), ranks=8)
    before = output(small)
    model = peft.get_peft_model(small, accepted())
    train_randomly(model)
    torch.testing.assert_close(output(model.eval().unload()), before)


def test_the_bias_of_an_adapter_is_merged():
    model = peft.get_peft_model(decomp.svd(bert(), ranks=8), accepted(lora_bias=True)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    adapted = output(model)
    torch.testing.assert_close(output(model.merge_and_unload(safe_merge=True)), adapted, rtol=1e-4, atol=1e-5)


def test_what_would_write_to_a_product_is_refused():
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*product"):
        accepted(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="use_dora=True"):
        accepted(use_dora=True)
    model = peft.get_peft_model(decomp.svd(bert(), ranks=8), accepted())
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="init_lora_weights='olora'"):
        model.add_adapter("second", lora(init_lora_weights="olora"))


def test_an_adapted_model_can_be_copied_and_pickled():
    model = peft.get_peft_model(decomp.svd(bert(), ranks=8), accepted()).eval()
    train_randomly(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(output(twin), output(model))
        assert (
            type(twin.base_model.model.encoder.layer[0].attention.self.query) is decomp.adapters.FactorizedLinear
        )
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        decomp.adapters.Nothing  # noqa: B018


def test_a_factor_by_itself_is_a_target_of_peft():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 32)).eval()
    x = torch.randn(2, 8, 6, 6)
    small = decomp.tucker(model, ranks=4)
    before = small(x).detach()
    adapted = peft.get_peft_model(small, lora(target_modules=["0.core", "2.expand"])).eval()
    torch.testing.assert_close(adapted(x).detach(), before)
    train_randomly(adapted)
    after = adapted(x).detach()
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(adapted.merge_and_unload()(x).detach(), after, rtol=1e-4, atol=1e-5)


def test_a_factorized_layer_may_be_set_to_the_weight_and_bias_that_it_gives_and_to_no_others():
    layer = decomp.svd(nn.Linear(32, 32), ranks=4)
    layer.weight, layer.bias = layer.weight, layer.bias
    for name, value in (
        ("weight", layer.weight + 1),
        ("weight", nn.Parameter(layer.weight.detach())),
        ("weight", layer.weight.double()),
        ("weight", layer.weight.to("meta")),
        ("bias", nn.Parameter(layer.bias.detach().clone())),
        ("bias", None),
    ):
        with pytest.raises(AttributeError, match="cannot be set"):
            setattr(layer, name, value)
