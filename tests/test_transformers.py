"""Transformers of Hugging Face and of torch: factorized, in every mode, with what is tied left tied."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import decomp
from decomp.layers import SVDEmbedding, SVDLinear
from decomp.network.flops import observe

CONTEXTS = [nullcontext, torch.no_grad, torch.inference_mode]


def gpt2():
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 120}
    return GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=48, n_layer=2, n_head=4, **tokens))


def bert(tie=True):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return BertForMaskedLM(
        BertConfig(vocab_size=120, max_position_embeddings=32, tie_word_embeddings=tie, **sizes)
    )


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("context", CONTEXTS, ids=["grad", "no_grad", "inference"])
@pytest.mark.parametrize("training", [True, False])
def test_models_of_hugging_face_run_factorized_in_every_mode(make, context, training):
    model = make().train(training)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    batch = {"input_ids": torch.randint(3, 120, (2, 12))}
    small = decomp.svd(model, ranks=8, example_inputs=batch)
    factorized = [layer for layer in small.modules() if isinstance(layer, SVDLinear)]
    assert len(factorized) >= 8
    calls = []
    for layer in factorized:
        layer.reduce.register_forward_hook(lambda *_: calls.append(1))
    with context():
        logits = small(**batch).logits
        expected = decomp.densify(small)(**batch).logits
    assert len(calls) == len(factorized), "a layer was bypassed"
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_conv1d_of_gpt2_costs_what_its_factors_cost():
    model = gpt2()
    batch = {"input_ids": torch.randint(3, 120, (1, 10))}
    small = decomp.svd(model, ranks=8, example_inputs=batch)
    choice = small.decomp_plan["transformer.h.0.attn.c_attn"]
    assert (choice.layer, choice.shape) == ("Conv1D 48>144", (48, 144))
    assert choice.macs == (10 * 48 * 144, 10 * 8 * (48 + 144))
    assert choice.params == (48 * 144 + 144, 8 * (48 + 144) + 144)
    assert small.decomp_plan.macs.after == observe(small, batch, {}).total_macs


@pytest.mark.parametrize("make", [gpt2, bert])
def test_tied_embeddings_stay_tied_and_dense(make):
    model = make()
    small = decomp.svd(model, ranks=8, layers=[nn.Linear, nn.Embedding])
    embedding, head = small.get_input_embeddings(), small.get_output_embeddings()
    assert embedding.weight is head.weight
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert "tied" in small.decomp_plan[names[id(module)]].reason
    assert decomp.profile(small, {"input_ids": torch.randint(3, 120, (1, 8))}).total.params == sum(
        parameter.numel() for parameter in small.parameters()
    )


def test_an_embedding_is_decomposed_when_asked_for():
    model = bert(tie=False).eval()
    left_alone = decomp.svd(model, ranks=8)
    assert isinstance(left_alone.bert.embeddings.word_embeddings, nn.Embedding)
    batch = {"input_ids": torch.randint(3, 120, (2, 12))}
    small = decomp.svd(model, ranks=8, layers="*word_embeddings", example_inputs=batch)
    layer = small.bert.embeddings.word_embeddings
    assert isinstance(layer, SVDEmbedding)
    assert layer.reduce.padding_idx == 0
    choice = small.decomp_plan["bert.embeddings.word_embeddings"]
    assert choice.params == (120 * 48, 8 * (120 + 48))
    assert choice.macs == (0, 2 * 12 * 8 * 48)  # a look-up has none: parameters alone decide
    torch.testing.assert_close(small(**batch).logits, decomp.densify(small)(**batch).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not cheaper at 48"):
        decomp.svd(model, ranks={"*word_embeddings": 48}, layers="*word_embeddings")
    ruled = decomp.plan(model, "svd", ranks=decomp.ranks.params(0.5), layers=nn.Embedding)
    assert ruled["bert.embeddings.word_embeddings"].params.after <= 0.5 * 120 * 48
    bounded = decomp.plan(model, params=0.7, layers=[nn.Embedding, nn.Linear])
    assert bounded.params.after <= 0.7 * bounded.params.before


def test_an_embedding_that_renormalizes_stays_dense():
    model = nn.Sequential(nn.Embedding(100, 32, max_norm=1.0), nn.Linear(32, 32))
    assert decomp.plan(model, ranks=4, layers=nn.Embedding)["0"].reason == "max_norm= changes its rows in forward"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch says so of its own fused path
@pytest.mark.parametrize("context", CONTEXTS, ids=["grad", "no_grad", "inference"])
@pytest.mark.parametrize("training", [True, False])
def test_the_transformer_encoder_of_torch_runs_factorized_in_every_mode(context, training):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    small = decomp.svd(model, ranks=8)
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    assert {small.decomp_plan[f"layers.0.{name}"].method for name in ("linear1", "linear2", *attention)} == {"svd"}
    calls = []
    for part in (small.layers[1].linear1, small.layers[1].self_attn.k_proj, small.layers[1].self_attn.out_proj):
        part.reduce.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with context():
        torch.testing.assert_close(
            small(x, src_key_padding_mask=mask)[0],
            decomp.densify(small)(x, src_key_padding_mask=mask)[0],
            rtol=1e-4,
            atol=1e-5,
        )
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch says so of its own fused path
@pytest.mark.parametrize("inplace", [False, True])
def test_densify_puts_transformer_encoders_back_on_the_fused_path_of_torch(inplace):
    def settings(model):
        return model.use_nested_tensor, [layer.activation_relu_or_gelu for layer in model.layers]

    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    assert settings(model) == (True, [2, 2])
    small = decomp.svd(model, ranks=8, layers="layers.0.*")
    assert settings(small) == (False, [0, 2])
    small = decomp.svd(small, ranks=8, layers="layers.1.linear1")
    assert settings(small) == (False, [0, 0])
    small = copy.deepcopy(pickle.loads(pickle.dumps(small)))
    dense = decomp.densify(small, inplace=inplace)
    assert settings(dense) == (True, [2, 2])
    assert settings(small) == (settings(dense) if inplace else (False, [0, 0]))
    assert vars(dense).keys() == vars(model).keys()
    x, mask = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        fused = dense(x, src_key_padding_mask=mask)
        torch.testing.assert_close(fused[~mask], dense.train()(x, src_key_padding_mask=mask)[~mask])
