"""int8: like ranges of the channels between factors, and models with attention."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import decomp
from decomp.layers import Factorized, group_kernels, join_kernels
from decomp.runtimes import ready
from decomp.runtimes.int8_ranges import with_like_ranges
from decomp.runtimes.processor import int8_sums_saturate
from decomp.runtimes.program import export_program

QUIET = {"progress": False}
LAYERS = {
    "tucker": (nn.Conv2d(12, 16, 3, padding=1), "tucker", (5, 6), (3, 12, 9, 8)),
    "groups": (nn.Conv2d(12, 16, 3, groups=2), "tucker", (4, 3), (3, 12, 9, 8)),
    "depthwise factors": (nn.Conv2d(12, 16, 3), "cp", (7,), (3, 12, 9, 8)),
    "transposed": (nn.ConvTranspose2d(12, 16, 3, stride=2), "tucker", (5, 6), (3, 12, 5, 4)),
    "along an axis": (nn.Conv1d(12, 16, 3), "tucker", (5, 6), (3, 12, 9)),
    "without a batch": (nn.Conv2d(12, 16, 3), "tucker", (5, 6), (12, 9, 8)),
    "linear": (nn.Linear(12, 16), "svd", (5,), (3, 4, 12)),
}


@torch.no_grad()
def unlike(layer):
    """A factorized layer whose channels between factors have ranges from 1 to 1000, with the same function."""
    for first, second in pairwise(layer.children()):
        before, after = group_kernels(first), group_kernels(second)
        scale = torch.logspace(0, 3, before.shape[0] * before.shape[1]).to(before)
        before = before * scale.reshape(*before.shape[:2], *[1] * (before.dim() - 2))
        after = after / scale.reshape(len(after), 1, after.shape[2], *[1] * (after.dim() - 3))
        for factor, kernels in ((first, before), (second, after)):
            factor.weight.copy_(join_kernels(kernels, input_first=getattr(factor, "transposed", False)))
    return layer


@pytest.mark.parametrize("case", LAYERS)
def test_like_ranges_change_nothing_but_the_channels_between_factors(case):
    torch.manual_seed(0)
    dense, method, ranks, shape = LAYERS[case]
    plan = decomp.plan(nn.Sequential(dense).double(), method, ranks, min_gain=0)
    model = plan.apply(nn.Sequential(dense).double().eval(), progress=False)
    assert isinstance(model[0], Factorized)
    unlike(model[0])
    before = copy.deepcopy(model.state_dict())
    data = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    alike = with_like_ranges(model, data)
    torch.testing.assert_close(alike(data[0]), model(data[0]), rtol=1e-10, atol=1e-12)
    assert any(not torch.equal(value, before[name]) for name, value in alike.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_scale_is_that_of_the_least_noise():
    """Noise by its definition: every value is rounded, uniformly and independently, within its step."""
    torch.manual_seed(0)
    model = decomp.svd(nn.Sequential(nn.Linear(12, 16)).double(), ranks=5, min_gain=0, progress=False).eval()
    unlike(model[0])
    first, second = model[0].children()
    data = [torch.randn(7, 12, dtype=torch.float64) for _ in range(3)]
    hidden = torch.cat([first(x) for x in data]).detach()
    top, weight = hidden.abs().amax(0), second.weight.detach()

    def noise(scale):
        h, w = hidden / scale, weight * scale
        steps = w.abs().amax(1)
        of_activation = h.abs().max() ** 2 * w.square().sum() * len(h)
        return float(of_activation + sum(step**2 * h.square().sum() for step in steps)) / len(h)

    exponents = (0.25, 0.5, 0.75, 1.0)
    exact = [top**a / weight.abs().amax(0) ** (1 - a) for a in exponents]
    scales = [torch.ones(5), *(scale.log2().round().exp2() for scale in exact)]
    scale = min(scales, key=noise)
    alike_first, alike_second = with_like_ranges(model, data)[0].children()
    torch.testing.assert_close(alike_first.weight, first.weight / scale[:, None], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(alike_second.weight, second.weight * scale, rtol=1e-6, atol=0.0)
    assert noise(scale) < 0.5 * noise(torch.ones(5))


def test_a_channel_that_is_never_used_stays_finite():
    model = decomp.svd(nn.Sequential(nn.Linear(12, 16)), ranks=5, min_gain=0, progress=False).eval()
    with torch.no_grad():
        model[0].reduce.weight[0] = 0.0
        model[0].expand.weight[:, 1] = 0.0
    x = torch.randn(4, 12)
    alike = with_like_ranges(model, [x])
    assert all(bool(parameter.isfinite().all()) for parameter in alike.parameters())
    torch.testing.assert_close(alike(x), model(x))


def rounded(x, dims):
    """The nearest of 255 steps of one range for the axes ``dims``."""
    step = x.abs().amax(dims, keepdim=True) / 127
    return torch.round(x / step) * step


def quantized(layer, x):
    """The output of a chain of linear factors with weights and activations rounded as int8."""
    for factor in layer.children():
        x = nn.functional.linear(rounded(x, tuple(range(x.dim()))), rounded(factor.weight, (1,)), factor.bias)
    return x


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_like_ranges_cost_int8_less(decay):
    torch.manual_seed(0)
    values = torch.arange(1, 33.0) ** -decay
    left, right = (torch.linalg.qr(torch.randn(64, 32))[0] for _ in range(2))
    dense = nn.Linear(64, 64)
    with torch.no_grad():
        dense.weight.copy_(left @ torch.diag(values) @ right.T)
    model = decomp.svd(nn.Sequential(dense), ranks=16, min_gain=0, progress=False).eval()
    x = torch.randn(256, 64)
    exact, alike = model(x), with_like_ranges(model, [x])
    before, after = ((quantized(net[0], x) - exact).norm() / exact.norm() for net in (model, alike))
    assert after < 1.05 * before  # balanced by their singular values, factors may be as good as they can be
    unlike(model[0])
    before = (quantized(model[0], x) - exact).norm() / exact.norm()
    assert after < 0.5 * before


class Attention(nn.Module):
    """Attention written out, with a mask and a dropout as transformers has them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        future = torch.ones(36, 36).triu(1).bool()
        self.register_buffer("mask", torch.zeros(36, 36).masked_fill(future, torch.finfo(torch.float32).min))

    def forward(self, x):
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).mT / 8 + self.mask[: x.shape[1], : x.shape[1]]
        x = x + self.out(nn.functional.dropout(scores.softmax(-1), 0.1, self.training) @ self.value(y))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def with_large_channels():
    """Two layers of attention whose LayerNorms give a few channels twenty times the size of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention()).eval()
    with torch.no_grad():
        for layer in model:
            layer.norm.weight[:2] = 20.0
            for linear in (layer.query, layer.key, layer.value, layer.up):
                linear.weight[:, :2] /= 20.0
    return model, [torch.randn(4, 10, 64) for _ in range(8)]


@pytest.mark.parametrize("runtime", ["openvino-int8", "onnxruntime-int8"])
def test_attention_survives_int8(runtime, monkeypatch):
    for package in ("openvino", "nncf") if runtime.startswith("openvino") else ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{runtime} needs {package}")
    model, data = with_large_channels()
    with torch.no_grad():
        expected = model(data[0])

    def error():
        result = ready(runtime, model, data[0], data)(data[0])
        return float((result - expected).norm() / expected.norm())

    found = error()
    monkeypatch.setattr("decomp.runtimes.program._attends", lambda graph: False)
    assert found < 0.7 * error()


def test_convolutions_beside_attention_are_quantized_by_the_data(tmp_path):
    pytest.importorskip("onnxruntime", reason="int8 files of ONNX need onnx and onnxruntime")
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.attention = nn.Conv2d(8, 64, 3, padding=1), Attention()

        def forward(self, x):
            return self.attention(self.convolution(x).flatten(2).mT)

    model, data = Both().eval(), [torch.randn(2, 8, 6, 6) for _ in range(4)]
    done = decomp.export(model, tmp_path / "both.onnx", data[0], int8=data)
    assert done.relative_error < 0.05
    assert done.bytes < 0.6 * decomp.export(model, tmp_path / "f32.onnx", data[0]).bytes


def test_hooks_masks_and_shared_factors_stay_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(4, 12)
    model = decomp.svd(nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))), ranks=4, min_gain=0, **QUIET).eval()
    for layer in model:
        unlike(layer)
    model[0].register_forward_hook(lambda module, given, output: 2 * output)
    model[1].reduce.register_forward_hook(lambda module, given, output: output.clamp(-1, 1))
    prune.l1_unstructured(model[2].reduce, "weight", 0.5)
    model[3].expand.weight = model[1].expand.weight
    alike = with_like_ranges(model, [x])
    torch.testing.assert_close(alike(x), model(x), rtol=1e-5, atol=1e-5)


def test_scales_round_nothing():
    model = decomp.svd(nn.Sequential(nn.Linear(12, 16)), ranks=5, min_gain=0, **QUIET).eval().bfloat16()
    unlike(model[0])
    x = torch.randn(4, 12).bfloat16()
    assert torch.equal(with_like_ranges(model, [x])(x), model(x))


def test_attention_is_found_in_the_graph():
    x = torch.randn(3, 10, 64)
    fused = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True).eval()
    classifier = nn.Sequential(nn.Linear(64, 8), nn.Softmax(-1)).eval()
    found = [export_program(model, x).attends for model in (Attention().eval(), fused, classifier)]
    assert found == [True, True, False]


def test_a_file_whose_int8_is_far_from_the_model_is_said(tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="int8 files of OpenVINO need openvino and nncf")
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(4, 16)
    monkeypatch.setattr("decomp.runtimes.export._difference", lambda *each: (1.0, 0.5))
    with pytest.warns(UserWarning, match=r"int8 changes the outputs of Sequential by 0\.5 of their size"):
        decomp.export(model, tmp_path / "small.xml", x, int8=[x])
    assert (tmp_path / "small.xml").exists()


@pytest.mark.parametrize("saturates", [True, False])
@pytest.mark.parametrize("ending", ["onnx", "xml"])
def test_weights_have_7_bits_where_sums_saturate(tmp_path, monkeypatch, ending, saturates):
    """Every weight of convolutions and linear layers, whatever the processor of this machine does."""
    runtime, needs = ("onnx_files", "onnxruntime") if ending == "onnx" else ("openvino_models", "openvino")
    pytest.importorskip(needs)
    monkeypatch.setattr(f"decomp.runtimes.{runtime}.int8_sums_saturate", lambda: saturates)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    data = [torch.randn(2, 3, 12, 12) for _ in range(3)]
    path = tmp_path / f"small.{ending}"
    decomp.export(model.eval(), path, data[0], int8=data)
    largest = [int(np.abs(weight.astype(int)).max()) for weight in int8_weights(path)]
    assert len(largest) == 3
    # NNCF always gives 7 bits to the first layer. Quantized ranges are of odd length: 63 or 64.
    of_7_bits = [value <= 64 for value in largest]
    assert sum(of_7_bits) == (3 if saturates else ending == "xml")


def int8_weights(path):
    """The weights of convolutions that a file holds as int8."""
    if path.suffix == ".onnx":
        import onnx

        arrays = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    else:
        from decomp.runtimes.openvino_models import read_openvino

        constants = [each for each in read_openvino(path).get_ops() if each.get_type_name() == "Constant"]
        arrays = [each.data for each in constants]
    return [each for each in arrays if each.dtype == np.int8 and each.ndim == 4]


@pytest.mark.parametrize(
    ("machine", "has", "saturates"),
    [
        ("x86_64", {"avx2": True}, True),
        ("x86_64", {"avx2": True, "avx512_vnni": True}, False),
        ("AMD64", {"avx2": True, "avx_vnni": True}, False),
        ("x86_64", {"amx_int8": True}, False),
        ("aarch64", {}, False),
        ("arm64", {}, False),
    ],
)
def test_processors_without_vnni_saturate(monkeypatch, machine, has, saturates):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert int8_sums_saturate.__wrapped__() is saturates
