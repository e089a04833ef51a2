"""The demo on real digits: what it promises, and what it prints and writes."""

from statistics import median

import pytest
import torch

import decomp
from decomp import digits
from decomp.cli import commands
from decomp.cli import main as cli
from decomp.demo import run as demo
from decomp.layers import Factorized


def test_digits_are_real_and_held_out_from_training():
    data = digits.load_digits(0)
    assert len(data.test[0]) == 360
    assert sum(len(images) for images in data.images) == 1437
    train = {tuple(image.flatten().tolist()) for images in data.images for image in images}
    assert sum(tuple(image.flatten().tolist()) in train for image in data.test[0]) == 0


def test_within_two_points_of_dense_after_fine_tuning_median_of_three_seeds():
    lost, fallen, guarded = [], [], []
    for seed in range(3):
        data = digits.load_digits(seed)
        dense = digits.train(data, seed, progress=False)
        guarded.append(data.accuracy(dense) - data.accuracy(decomp.tucker(dense, ranks="vbmf")))
        with pytest.warns(UserWarning, match="may hardly work before it is fine-tuned"):
            small = decomp.tucker(dense, ranks=decomp.ranks.vbmf(pure=True))
        fallen.append(data.accuracy(dense) - data.accuracy(small))
        decomp.finetune_layerwise(small, dense, data.images)
        lost.append(data.accuracy(dense) - data.accuracy(small))
        assert data.accuracy(dense) > 0.97
    assert median(lost) < 0.02
    assert median(fallen) > 0.1, "without fine-tuning the network falls far: else this shows nothing"
    assert max(guarded) < 0.03, "the one line gives a network that works"


def test_the_run_prints_and_writes_what_it_says_and_is_reproducible(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ENERGIES", (0.7,))
    monkeypatch.setattr(demo, "train", lambda data, seed: digits.train(data, seed, epochs=3, progress=False))
    runtimes = demo.shipping_runtimes()
    asked = [runtimes, ()]  # the second run has none: quantizing is slow
    monkeypatch.setattr(demo, "shipping_runtimes", lambda: asked.pop(0))
    said: list[str] = []
    outcomes = [demo.run(tmp_path / str(i), 0, said.append) for i in range(2)]
    first, second = (outcome.model.state_dict() for _, outcome in outcomes)
    assert all(torch.equal(first[name], second[name]) for name in first)
    text = "\n".join(said)
    assert "layer2.conv1" in text
    assert "fewer MACs" in text
    assert all(f"{name}: " in text for name in runtimes)
    assert "decomp[openvino]" in text
    for stage in ("dense", "compressed", "fine-tuned"):
        assert stage in text
    assert (tmp_path / "0" / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"
    rebuilt = decomp.load(tmp_path / "0" / "digits-tucker.safetensors", digits.DigitNet())
    assert any(isinstance(module, Factorized) for module in rebuilt.modules())
    assert all(torch.equal(first[name], value) for name, value in rebuilt.state_dict().items())


def test_the_demo_times_the_digits_in_the_fastest_runtime_that_is_installed(monkeypatch):
    for installed, names in (
        ({"openvino", "nncf", "onnxruntime", "onnx", "onnxscript"}, ("openvino", "openvino-int8")),
        ({"openvino", "onnxruntime", "onnx", "onnxscript"}, ("onnxruntime", "onnxruntime-int8")),
        ({"onnxruntime"}, ()),
    ):
        monkeypatch.setattr(demo, "find_spec", lambda name, installed=installed: name in installed or None)
        assert demo.shipping_runtimes() == names


def test_the_command_line_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 1
    assert "pip install 'decomp[demo]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([])
