"""Checkpoints that are compressed tensor by tensor: as if the model had been loaded, whatever cuts them off."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_huggingface import IDS, NOISE, bert, gpt2, llama, mixtral, t5, vit

import decomp
import decomp.huggingface
from decomp.cli.main import main
from decomp.files import checkpoints, shards
from decomp.files.checkpoints import compress_checkpoint
from decomp.layers import Factorized

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


FAMILIES = {
    "bert": (bert, {"input_ids": IDS}),
    "gpt2": (gpt2, {"input_ids": IDS}),
    "llama": (llama, {"input_ids": IDS}),
    "mixtral": (mixtral, {"input_ids": IDS}),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "vit": (vit, {"pixel_values": NOISE}),
}


def written(folder, make=bert, shard="20KB", **more):
    torch.manual_seed(0)
    model = make(**more).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def content(folder):
    """All tensors of a checkpoint, and what its config.json says."""
    tensors = {name: entry.tensor() for name, entry in shards.checkpoint_entries(folder).items()}
    return tensors, json.loads((folder / "config.json").read_text())


def same(one, two):
    (ours, config), (theirs, other) = content(one), content(two)
    assert config == other
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_that_of_the_loaded_model(family, tmp_path):
    make, inputs = FAMILIES[family]
    model = written(tmp_path / "dense", make)
    plan = compress_checkpoint(tmp_path / "dense", tmp_path / "small", ranks=8, max_shard_bytes=30_000)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    small = decomp.huggingface.from_pretrained(tmp_path / "small").eval()
    packed = [name for name, choice in plan.items() if choice.reason.startswith("packed")]
    expected = decomp.svd(model, ranks=8, exclude=[f"{name}*" for name in packed]).eval()
    factorized = {name for name, module in expected.named_modules() if isinstance(module, Factorized)}
    assert plan.replaced == factorized == small.decomp_plan.replaced
    assert len(factorized) >= 8
    with torch.no_grad():
        ours, theirs = small(**inputs).logits, expected(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert plan.params.after == sum(p.numel() for p in small.parameters())
    again = tmp_path / "again"
    small.save_pretrained(again)
    with torch.no_grad():
        assert torch.equal(decomp.huggingface.from_pretrained(again).eval()(**inputs).logits, ours)


def test_of_a_checkpoint_without_the_prefix_and_in_bfloat16(tmp_path):
    model = gpt2().to(torch.bfloat16).eval()
    model.transformer.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    compress_checkpoint(tmp_path / "dense", tmp_path / "small", ranks=8)
    small = decomp.huggingface.from_pretrained(tmp_path / "small", dtype=torch.bfloat16).eval()
    expected = decomp.svd(model, ranks=8).eval()
    assert next(small.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        difference = (small(IDS).logits - expected(IDS).logits).float().norm()
    assert difference < 0.02 * expected(IDS).logits.float().norm()


def test_rules_globs_plans_and_selection_are_obeyed(tmp_path):
    model = written(tmp_path / "dense")
    plan = compress_checkpoint(
        tmp_path / "dense",
        tmp_path / "a",
        ranks={"*query": 8, "*.1.*key": decomp.ranks.params(0.5)},
        exclude="*0.*",
    )
    assert {name.rpartition("layer.")[2] for name in plan.replaced} == {
        "1.attention.self.query",
        "1.attention.self.key",
    }
    assert plan["bert.encoder.layer.0.attention.self.query"].reason == "excluded"
    key = plan["bert.encoder.layer.1.attention.self.key"]
    assert key.params.after <= 0.5 * key.params.before
    decided = decomp.plan(model, "svd", decomp.ranks.energy(0.5, pure=True)).keep_dense("*.1.*")
    given = decomp.Plan.from_json(decided.to_json())
    plan = compress_checkpoint(tmp_path / "dense", tmp_path / "b", ranks=given)
    assert {name: plan[name].ranks for name in plan} == {name: decided[name].ranks for name in decided}
    assert "tied" in plan["cls.predictions.decoder"].reason


@pytest.mark.parametrize("share", [0.5, 0.7, 0.8])
def test_which_layers_are_at_risk_is_decided_as_for_the_loaded_model(share, tmp_path):
    model = written(tmp_path / "dense", llama)
    with torch.no_grad():  # some layers are of low rank, and others are noise
        for index, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight.copy_(torch.randn(96, 4 + index) @ torch.randn(4 + index, 48))
            layer.self_attn.q_proj.weight.copy_(torch.randn(48, 6) @ torch.randn(6, 48) + torch.randn(48, 48))
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    expected = decomp.plan(model, "svd", decomp.ranks.energy(share))
    plan = compress_checkpoint(tmp_path / "dense", tmp_path / "small", ranks=decomp.ranks.energy(share))
    assert {name: (each.ranks, each.at_risk) for name, each in plan.items()} == {
        name: (each.ranks, each.at_risk) for name, each in expected.items()
    }
    assert any(each.at_risk for each in plan.values())
    assert any(each.ranks for each in plan.values())
    small = decomp.huggingface.from_pretrained(tmp_path / "small").eval()
    whole = expected.apply(model).eval()
    with torch.no_grad():
        assert torch.allclose(small(IDS).logits, whole(IDS).logits, atol=1e-4)


def test_a_call_that_was_cut_off_does_only_what_is_left(tmp_path, monkeypatch):
    written(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "at_once", ranks=8)
    done, write = [], checkpoints._write_result

    def counted(path, *result):
        if len(done) % 4 == 3:
            done.append("cut off")
            raise KeyboardInterrupt
        done.append(path)
        write(path, *result)

    monkeypatch.setattr(checkpoints, "_write_result", counted)
    for _ in range(9):
        try:
            compress_checkpoint(tmp_path / "dense", tmp_path / "small", ranks=8)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "small" / "config.json").exists(), "nothing that is unfinished can be loaded"
    paths = [path for path in done if path != "cut off"]
    assert "cut off" in done
    assert len(paths) == len(set(paths))
    assert same(tmp_path / "small", tmp_path / "at_once")
    assert not (tmp_path / "small" / checkpoints.WORK).exists()


def test_a_call_that_was_cut_off_while_files_were_written_goes_on(tmp_path, monkeypatch):
    written(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "at_once", ranks=8, max_shard_bytes=30_000)
    write, count = shards.write_file, iter(range(100))

    def failing(*arguments):
        if next(count) == 2:
            raise OSError("no space left")
        write(*arguments)

    monkeypatch.setattr(shards, "write_file", failing)
    with pytest.raises(OSError, match="no space left"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "small", ranks=8, max_shard_bytes=30_000)
    compress_checkpoint(tmp_path / "dense", tmp_path / "small", ranks=8, max_shard_bytes=30_000)
    assert same(tmp_path / "small", tmp_path / "at_once")


def test_two_processes_one_of_which_is_killed_give_the_same_result(tmp_path):
    written(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "at_once", ranks=8)
    command = [
        sys.executable,
        "-m",
        "decomp",
        "compress",
        "dense",
        "--weights-only",
        "--ranks",
        "8",
        "--method",
        "svd",
    ]

    def started(rank):
        environment = {**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "2"}
        return subprocess.Popen(
            [*command, "--output", "small"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )

    first = started(0)
    work = tmp_path / "small" / checkpoints.WORK
    deadline = time.monotonic() + 120
    while not list(work.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert work.exists()
    processes = [started(0), started(1)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "whole model" in outputs[0]
    assert outputs[1] == "", "one process reports"
    assert same(tmp_path / "small", tmp_path / "at_once")


def test_memory_is_that_of_the_largest_layer_not_of_the_checkpoint(tmp_path):
    sizes = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 1024}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=120_000, **sizes))
    model.save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    total = sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    assert total > 330e6
    code = """
import resource, torch, transformers
from decomp.files.checkpoints import compress_checkpoint
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=90)
transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained("tiny")
compress_checkpoint("tiny", "tiny_small", ranks=4)  # imports what is imported late
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compress_checkpoint("dense", "small", ranks=16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert int(run.stdout.split()[-1]) < 100e6, "the embedding alone has 246 MB"


def test_what_is_refused_leaves_the_output_as_it_was(tmp_path):
    dense, small = tmp_path / "dense", tmp_path / "small"
    written(dense)
    for folder, message in ((tmp_path, "has no config.json"), (tmp_path / "none", "has no config.json")):
        with pytest.raises(ValueError, match=message):
            compress_checkpoint(folder, small)
    with pytest.raises(decomp.NothingToDecompose, match="no layer would be replaced"):
        compress_checkpoint(dense, small, ranks=decomp.ranks.energy(0.999999))
    assert not list(small.iterdir())
    with pytest.raises(ValueError, match="matches no layer"):
        compress_checkpoint(dense, small, ranks={"no.such.layer": 8})
    compress_checkpoint(dense, small, ranks=8)
    before = content(small)
    with pytest.raises(ValueError, match="exists and holds something else"):
        compress_checkpoint(dense, small, ranks=9)
    assert before[1] == content(small)[1]
    with pytest.raises(ValueError, match="quantized already, by decomp"):
        compress_checkpoint(small, tmp_path / "smaller")
    (tmp_path / "begun" / checkpoints.WORK).mkdir(parents=True)
    (tmp_path / "begun" / checkpoints.WORK / "job").write_text("another")
    with pytest.raises(ValueError, match="unfinished work of another checkpoint"):
        compress_checkpoint(dense, tmp_path / "begun", ranks=8)
    shard = sorted(dense.glob("*.safetensors"))[3]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"{shard.name}.*damaged"):
        compress_checkpoint(dense, tmp_path / "other", ranks=8)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        compress_checkpoint(dense, tmp_path / "other", ranks=8)
    assert not (tmp_path / "other").exists()


def test_the_command_refuses_what_needs_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written("dense")
    for more in (["--params", "0.5"], ["--data", "x"], ["--sequential"]):
        assert main(["compress", "dense", "--weights-only", "--output", "small", *more]) == 1
        assert "loads no model: leave" in capsys.readouterr().err
    assert main(["compress", "a:b", "--weights-only", "--output", "small"]) == 1
    assert main(["compress", "dense", "--weights-only", "--output", "s", "--ranks", "params(0.5)", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == "s"


def test_what_stands_beside_the_weights_comes_along_and_other_models_do_not(tmp_path):
    """As in a folder of sentence-transformers, whose later modules have folders of their own."""
    written(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    for name in ("tokenizer.json", "2_Dense/config.json", "2_Dense/model.safetensors", "chat_templates/a.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for output in ("small", "smaller"):  # the second finds the first in the folder
        compress_checkpoint(tmp_path, tmp_path / output, ranks=8)
        found = {str(path.relative_to(tmp_path / output)) for path in (tmp_path / output).rglob("*.*")}
        assert found == {
            *("config.json", "model.safetensors", "modules.json", "tokenizer.json"),
            *("2_Dense/config.json", "2_Dense/model.safetensors", "chat_templates/a.jinja"),
        }


def test_files_are_written_as_safetensors_writes_them(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "one.safetensors")
    entries = shards.entries_of(tmp_path / "one.safetensors")
    assert all(torch.equal(entries[name].tensor(), each) for name, each in tensors.items())
    shards.write_file(tmp_path / "two.safetensors", entries, {"format": "pt"})
    again = load_file(tmp_path / "two.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], each) for name, each in tensors.items())
