"""Compressed models of transformers are saved and loaded by its own calls, or refused."""

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.quantizers import HfQuantizer

import decomp
from decomp import hosts
from decomp.layers import Factorized
from decomp.methods import METHODS

ROOT = Path(__file__).parents[1]
TOKENS = {"vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bert(**more):
    config = transformers.BertConfig(max_position_embeddings=32, vocab_size=120, **SIZES, **more)
    return transformers.BertForMaskedLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=32, n_embd=48, n_layer=2, n_head=4, **TOKENS)
    )


def llama(**more):
    config = transformers.LlamaConfig(
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, **SIZES, **TOKENS, **more
    )
    return transformers.LlamaForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(
        num_key_value_heads=2, max_position_embeddings=32, num_local_experts=2, **SIZES, **TOKENS
    )
    return transformers.MixtralForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=120, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **SIZES)
    return transformers.ViTForImageClassification(config)


def whisper():
    config = transformers.WhisperConfig(
        **TOKENS,
        d_model=48,
        num_mel_bins=20,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=1,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
    )
    return transformers.WhisperForConditionalGeneration(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


TEXT = {"input_ids": IDS}
SPEECH = {"input_features": torch.randn(2, 20, 32), "decoder_input_ids": IDS}
FAMILIES = {
    "bert": (bert, "AutoModelForMaskedLM", TEXT),
    "gpt2": (gpt2, "AutoModelForCausalLM", TEXT),
    "llama": (llama, "AutoModelForCausalLM", TEXT),
    "mixtral": (mixtral, "AutoModelForCausalLM", TEXT),
    "t5": (t5, "AutoModelForSeq2SeqLM", {**TEXT, "decoder_input_ids": IDS}),
    "vit": (vit, "AutoModelForImageClassification", {"pixel_values": NOISE}),
    "whisper": (whisper, "AutoModelForSpeechSeq2Seq", SPEECH),
    "resnet": (resnet, "AutoModelForImageClassification", {"pixel_values": NOISE}),
}
DTYPES = {"": torch.float32, "-bf16": torch.bfloat16}


def compressed(name, dtype=torch.float32):
    make, _, inputs = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    model = type(model)._from_config(model.config, dtype=dtype)  # .to(dtype) would also round rotary frequencies
    return decomp.tucker(model.eval(), ranks=4, example_inputs=in_dtype(inputs, dtype))


def in_dtype(inputs, dtype):
    return {key: each.to(dtype) if each.is_floating_point() else each for key, each in inputs.items()}


def run_job(mode, folders):
    command = [sys.executable, str(ROOT / "tests" / "huggingface_job.py"), mode, *map(str, folders)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every family in two dtypes, saved here and loaded in two fresh processes, with decomp and without."""
    root, expected = tmp_path_factory.mktemp("checkpoints"), {}
    for name, (_, auto, inputs) in FAMILIES.items():
        for suffix, dtype in DTYPES.items():
            folder, small = root / f"{name}{suffix}", compressed(name, dtype)
            small.save_pretrained(folder)
            given = in_dtype(inputs, dtype)
            torch.save(given, folder / "inputs.pt")
            (folder / "auto.txt").write_text(auto)
            with torch.no_grad():
                expected[folder.name] = small, small(**given)[0]
    run_job("with", [root / name for name in expected])
    run_job("without", [root / name for name in expected])
    return root, expected


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_loaded_in_a_fresh_process_with_exact_outputs_and_no_key_left_over(
    checkpoints, name, suffix
):
    root, expected = checkpoints
    small, outputs = expected[f"{name}{suffix}"]
    assert any(isinstance(module, Factorized) for module in small.modules())
    loaded = torch.load(root / f"{name}{suffix}" / "loaded.pt")
    assert loaded["outputs"].dtype == DTYPES[suffix]
    assert torch.equal(loaded["outputs"], outputs)
    assert not any(loaded["keys"].values()), loaded["keys"]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_decomp_transformers_refuses_the_checkpoint(checkpoints, name):
    kind, message = json.loads((checkpoints[0] / name / "error.json").read_text())
    assert kind == "RuntimeError"
    assert "mismatched" in message


def equal(one, two, inputs=TEXT):
    with torch.no_grad():
        return torch.equal(one(**inputs)[0], two(**inputs)[0])


def checked(kind, folder, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def test_what_was_loaded_is_a_compressed_model_like_the_one_saved(checkpoints, tmp_path):
    root, expected = checkpoints
    small = expected["gpt2"][0]
    again = checked(transformers.AutoModelForCausalLM, root / "gpt2")
    assert json.loads(again.decomp_plan.to_json()) == json.loads(small.decomp_plan.to_json())
    assert list(again.decomp_plan) == list(small.decomp_plan)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again.generate(IDS, max_new_tokens=5), small.generate(IDS, max_new_tokens=5))
    assert again._keys_to_ignore_on_load_unexpected == small._keys_to_ignore_on_load_unexpected
    again.half()
    copies = (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        checked(transformers.AutoModelForCausalLM, root / "gpt2"),
    )
    for number, each in enumerate(copies):
        each.save_pretrained(tmp_path / str(number))
        assert equal(checked(transformers.GPT2LMHeadModel, tmp_path / str(number)), small)
    files = [(folder / "config.json").read_text() for folder in (root / "gpt2", tmp_path / "2")]
    assert json.loads(files[0])["quantization_config"] == json.loads(files[1])["quantization_config"]


def test_sharded_checkpoints_and_device_maps(checkpoints, tmp_path):
    small = checkpoints[1]["llama"][0]
    small.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert equal(checked(transformers.LlamaForCausalLM, tmp_path, device_map=device_map), small)
    split = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    split |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = checked(
        transformers.LlamaForCausalLM, tmp_path, device_map=split, offload_folder=tmp_path / "offload"
    )
    assert equal(offloaded, small)


def test_a_class_with_another_head_or_none_takes_what_it_has(checkpoints, tmp_path):
    small = checkpoints[1]["bert"][0]
    base = transformers.AutoModel.from_pretrained(checkpoints[0] / "bert", add_pooling_layer=False)
    assert equal(base, small.bert)
    assert "encoder.layer.0.output.dense" in base.decomp_plan
    assert not any(name.startswith("cls") for name in base.decomp_plan)
    base.save_pretrained(tmp_path / "base")
    headed, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert equal(headed.bert, small.bert)
    assert all(key.startswith("cls.") for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    other = transformers.BertForSequenceClassification.from_pretrained(checkpoints[0] / "bert")
    assert torch.equal(
        other.bert.encoder.layer[1].output.dense.weight, small.bert.encoder.layer[1].output.dense.weight
    )


def test_a_part_of_a_compressed_model_can_be_saved_by_itself(checkpoints, tmp_path):
    small = checkpoints[1]["bert"][0]
    small.bert.save_pretrained(tmp_path / "part")
    part = checked(transformers.BertModel, tmp_path / "part", add_pooling_layer=False)
    assert equal(part, small.bert)
    assert part.decomp_plan.params.after == sum(parameter.numel() for parameter in small.bert.parameters())
    small.save_pretrained(tmp_path / "whole")
    assert equal(checked(transformers.BertForMaskedLM, tmp_path / "whole"), small)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.head = bert().eval().bert, nn.Linear(48, 48)

    tagger = decomp.svd(Tagger(), ranks=4)
    tagger.bert.save_pretrained(tmp_path / "inside")
    assert equal(checked(transformers.BertModel, tmp_path / "inside", add_pooling_layer=False), tagger.bert)


def test_a_dense_model_again_is_saved_as_one(checkpoints, tmp_path):
    for small in (
        copy.deepcopy(checkpoints[1]["gpt2"][0]),
        transformers.GPT2LMHeadModel.from_pretrained(checkpoints[0] / "gpt2"),
    ):
        dense = decomp.densify(small)
        dense.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert equal(checked(transformers.GPT2LMHeadModel, tmp_path), dense)
        assert small.config.quantization_config.quant_method == "decomp"
        smaller = decomp.svd(decomp.densify(small, inplace=True), ranks=2)
        smaller.save_pretrained(tmp_path)
        assert equal(checked(transformers.GPT2LMHeadModel, tmp_path), smaller)


def test_the_dense_model_and_its_configuration_are_left_alone():
    model = bert().eval()
    before = model.config.to_json_string()
    small = decomp.svd(model, ranks=4)
    assert model.config.to_json_string() == before
    assert not hasattr(model, "hf_quantizer")
    assert small.config.quantization_config.to_plan().to_json() == small.decomp_plan.to_json()
    decomp.svd(model, ranks=4, inplace=True)
    assert model.config.quantization_config.quant_method == "decomp"


def test_a_model_that_is_not_as_its_plan_says_is_not_saved(tmp_path):
    small = decomp.svd(bert().eval(), ranks=4)
    small.bert.encoder.layer[0].output.dense = nn.Linear(96, 48)
    with pytest.raises(
        ValueError, match=r"'bert.encoder.layer.0.output.dense' is a Linear, the plan of the model"
    ):
        small.save_pretrained(tmp_path)


def test_a_method_of_the_users_own_is_not_saved(tmp_path):
    own = replace(METHODS["svd"], name="mine")
    small = decomp.plan(bert(), own, 4).apply(bert())
    with pytest.raises(ValueError, match=r"by a method of your own, 'mine', which from_pretrained would not find"):
        small.save_pretrained(tmp_path)


def test_checkpoints_that_do_not_fit_are_refused(checkpoints, tmp_path):
    import decomp.huggingface as ours

    small = checkpoints[1]["bert"][0]
    transformers.BertForMaskedLM(small.config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"model.safetensors' holds dense layers, and its config.json the plan"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "dense")
    bert().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain' is no compressed model of decomp"):
        ours.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="cannot compress a model while it is loaded"):
        transformers.BertForMaskedLM.from_pretrained(
            tmp_path / "plain", quantization_config=small.config.quantization_config
        )
    small.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())

    def edited(edit):
        changed = copy.deepcopy(config)
        edit(changed)
        (tmp_path / "small" / "config.json").write_text(json.dumps(changed))

    def layers(config):
        return config["quantization_config"]["plan"]["layers"]

    edited(lambda config: layers(config)["bert.encoder.layer.0.output.dense"].update(ranks="33"))
    with pytest.raises(
        ValueError, match=r"quantization_config.plan: not a plan of decomp: layers.bert.*ranks: '33'"
    ):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    edited(
        lambda config: layers(config).update({"bert.other": layers(config)["bert.encoder.layer.0.output.dense"]})
    )
    with pytest.raises(ValueError, match=r"made for another model: this one has no layer 'bert.other'"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    edited(lambda config: config["quantization_config"].update(bits=4))
    with pytest.raises(ValueError, match=r"unknown fields \['bits'\]"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    edited(lambda config: config.update(architectures=["Unknown"]))
    with pytest.raises(ValueError, match="transformers has no class 'Unknown'"):
        ours.from_pretrained(tmp_path / "small")
    edited(lambda config: config.update(architectures=["BertForSequenceClassification"]))
    with pytest.raises(ValueError, match=r"small': missing keys: .*classifier.bias"):
        ours.from_pretrained(tmp_path / "small")


def test_where_transformers_takes_no_quantizers_of_others_saving_raises(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "decomp.huggingface", None)
    small = decomp.svd(bert().eval(), ranks=4)
    assert small(**TEXT)[0].shape == (2, 12, 120)
    with pytest.raises(
        ValueError, match=r"quantized with decomp .not saved by this version of transformers: .* use"
    ):
        small.save_pretrained(tmp_path)


class Foreign(HfQuantizer):
    """A quantizer that could save the model, if nothing else had been changed in it."""

    is_trainable = True

    def is_serializable(self):
        return True


def test_a_model_that_another_method_has_quantized_is_not_saved_as_if_it_had_one_change(tmp_path):
    model = bert().eval()
    model.hf_quantizer, model.is_quantized = Foreign(SimpleNamespace(quant_method="other")), True
    small = decomp.svd(model, ranks=4)
    with (
        pytest.warns(UserWarning, match="quantized and compressed by decomp as well"),
        pytest.raises(ValueError, match="quantized with other and is not serializable"),
    ):
        small.save_pretrained(tmp_path)
    assert small.is_quantized
    assert model.hf_quantizer.is_serializable()
    assert decomp.densify(small).hf_quantizer.is_serializable()


def test_only_models_of_transformers_are_looked_at(monkeypatch):
    monkeypatch.setitem(sys.modules, "decomp.huggingface", None)
    model = nn.Linear(8, 8)
    hosts.tell_transformers(model)
    assert not hasattr(model, "hf_quantizer")


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, 120, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_the_trainer_trains_a_compressed_model_and_resumes_to_the_same_weights(tmp_path):
    def trainer(steps, folder):
        torch.manual_seed(0)
        small = decomp.svd(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), ranks=4)
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return transformers.Trainer(small, arguments, train_dataset=Sentences())

    whole = trainer(4, "whole")
    before = {name: each.clone() for name, each in whole.model.state_dict().items()}
    whole.train()
    half = trainer(2, "half")
    half.train()
    resumed = trainer(4, "half")
    resumed.train(resume_from_checkpoint=True)
    after = whole.model.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("reduce.weight"))
    assert all(torch.equal(each, after[name]) for name, each in resumed.model.state_dict().items())
    loaded = checked(transformers.AutoModelForMaskedLM, tmp_path / "half" / "checkpoint-4")
    assert equal(loaded, whole.model.eval())
