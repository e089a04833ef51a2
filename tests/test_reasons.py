"""Errors and reasons say what stands in the way, and calls take what they can use."""

import re
import sys

import pytest
import torch
from networks import plant_spectra
from torch import nn

import decomp
import decomp.digits
from decomp.layers import SVDLinear


@pytest.fixture
def model():
    layers = nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 24, 3), nn.Flatten(), nn.Linear(24 * 16, 48)
    return plant_spectra(nn.Sequential(*layers)).eval()


@pytest.fixture
def image():
    return torch.randn(2, 8, 8, 8)


def test_the_end_of_compression_in_stages_can_be_told_from_other_errors():
    model = plant_spectra(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    gains = []
    for gain in (0.1, 0.5, 0.99):
        try:
            model = decomp.densify(decomp.svd(model, decomp.ranks.energy(0.9), min_gain=gain))
        except decomp.NothingToDecompose as error:
            message = str(error)
            break
        gains.append(gain)
    assert gains == [0.1, 0.5]
    assert re.match("no layer would be replaced: 1 x too little gain at", message)
    assert issubclass(decomp.NothingToDecompose, ValueError)
    assert issubclass(decomp.OutOfReach, ValueError)
    with pytest.raises(decomp.NothingToDecompose, match="no layer can be decomposed under a budget"):
        decomp.compress(nn.Sequential(nn.LSTMCell(4, 4)), params=0.5)


def test_a_budget_out_of_reach_names_the_layers_that_block_it(model, image):
    with pytest.raises(decomp.OutOfReach) as caught:
        decomp.compress(model, image, macs=0.2, exclude=["0", "2"])
    dense = decomp.profile(model, image)
    blocked = dense.rows["0"].macs + dense.rows["2"].macs
    share = f"{100 * blocked / dense.total.macs:.0f} %"
    assert f"{share} in '2' and 1 more (excluded)" in str(caught.value)
    tall = nn.Sequential(nn.Linear(64, 1), nn.Linear(1, 64), nn.Linear(64, 64))
    with pytest.raises(decomp.OutOfReach, match=r"'1' and 1 more \(no decomposition of it is cheaper\)"):
        decomp.compress(tall, params=0.01)


def test_the_macs_of_a_module_around_layers_are_counted_once():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 64))
            self.inner = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.inner(x @ self.table)

    model = nn.Sequential(Mixed(), nn.Linear(64, 128, bias=False))
    with pytest.raises(decomp.OutOfReach, match=r"of the dense model 25 % in '0' \(no method supports Mixed\)$"):
        decomp.compress(model, torch.randn(1, 64), macs=0.1)
    with pytest.raises(decomp.OutOfReach, match=r"25 % in '0' \(no .*\), 25 % in '0.inner' \(not among layers=\)"):
        decomp.compress(model, torch.randn(1, 64), macs=0.1, layers="1")


def test_a_number_that_looks_like_a_percentage_is_questioned(model, image):
    with pytest.raises(decomp.OutOfReach, match=r"did you mean the share macs=0\.5"):
        decomp.compress(model, image, macs=50)
    with pytest.raises(decomp.OutOfReach) as caught:
        decomp.compress(model, image, macs=1000)
    assert "did you mean" not in str(caught.value)


def test_a_budget_of_seconds_says_what_the_dense_model_takes(model, image, seconds_of_macs):
    seconds = decomp.profile(model, image).total.macs * seconds_of_macs
    with pytest.raises(decomp.OutOfReach, match=f"of the {seconds:.3g} that the dense model takes"):
        decomp.plan(model, example_inputs=image, seconds=1e-9)
    plan = decomp.plan(model, example_inputs=image, seconds=0.8)
    assert plan["0"].reason == f"the dense model is within seconds=0.8: it takes {1e3 * seconds:.3g} ms"


def test_a_layer_that_cannot_be_decomposed_says_why_when_it_is_named():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3))
    with pytest.raises(
        ValueError, match=r"ranks=\{'0': ...\} matches no layer.*'0' cannot \(depthwise.*can are '1'"
    ):
        decomp.plan(model, ranks={"0": 4})
    with pytest.raises(ValueError, match=r"'nothing'.*those that can are '1'"):
        decomp.plan(model, ranks={"nothing": 4})


def test_a_plan_takes_example_inputs_and_an_empty_exclude(model, image):
    plan = decomp.plan(model, ranks=4)
    assert plan.macs is None
    small = decomp.tucker(model, plan, example_inputs=image, exclude=[])
    direct = decomp.tucker(model, ranks=4, example_inputs=image)
    assert small.decomp_plan.macs == direct.decomp_plan.macs
    assert dict(small.decomp_plan) == dict(direct.decomp_plan)
    larger = torch.randn(2, 8, 8, 8).repeat(2, 1, 1, 1)
    again = decomp.tucker(model, decomp.plan(model, ranks=4, example_inputs=image), example_inputs=larger)
    assert again.decomp_plan.macs.before == 2 * direct.decomp_plan.macs.before
    assert again.decomp_plan.macs.after == 2 * direct.decomp_plan.macs.after


def test_a_plan_with_example_inputs_keeps_its_statistics(model, image):
    plan = decomp.plan(model, ranks=4, data=[image, image + 1])
    with_inputs = decomp.tucker(model, plan, example_inputs=image)
    without = decomp.tucker(model, plan)
    for one, other in zip(with_inputs.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_plan_of_a_factorized_model_takes_example_inputs(model, image):
    first = decomp.tucker(model, ranks=4, layers="0", example_inputs=image)
    plan = decomp.plan(first, ranks=4, layers="2")
    small = decomp.tucker(first, plan, example_inputs=image)
    expected = decomp.tucker(first, ranks=4, layers="2", example_inputs=image)
    assert small.decomp_plan.macs == expected.decomp_plan.macs
    assert small.decomp_plan.macs.before == decomp.profile(model, image).total.macs


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.other = nn.Linear(64, 64)

    def forward(self, x):
        return self.other(self.second(self.first(x)))


@pytest.mark.parametrize(
    "choice", [{"layers": "second"}, {"ranks": {"sec*": 4}}, {"exclude": "other", "ranks": 4}]
)
def test_every_name_of_a_shared_layer_selects_it(choice):
    small = decomp.svd(Shared(), **{"ranks": 4, **choice})
    assert small.second is small.first
    assert isinstance(small.second, SVDLinear)
    assert isinstance(small.other, nn.Linear)


def test_a_second_name_leaves_a_shared_layer_out_or_fixes_its_rank_exactly():
    plan = decomp.plan(Shared(), ranks=4, exclude="second")
    assert (plan["first"].reason, plan["other"].ranks) == ("excluded", (4,))
    with pytest.raises(ValueError, match="exceeds its largest ranks"):
        decomp.plan(Shared(), ranks={"second": 65})


def test_a_generator_is_enough_for_one_pass(model, image):
    def batches():
        yield image
        yield image + 1

    expected = decomp.calibrate(model, list(batches()))
    given = decomp.calibrate(model, batches())
    assert given["0"].samples == expected["0"].samples
    small = decomp.tucker(model, ranks=4, data=batches())
    assert small.decomp_plan["0"].output_error is not None
    assert decomp.sensitivity(model, batches()) == decomp.sensitivity(model, list(batches()))


@pytest.mark.parametrize("options", [{"finetune": True}, {"sequential": True}])
def test_a_generator_is_refused_before_anything_is_taken_from_it(model, image, options):
    taken = []

    def batches():
        taken.append(1)
        yield image

    for call in (decomp.tucker, decomp.compress):
        more = {"ranks": 4} if call is decomp.tucker else {"params": 0.5}
        with pytest.raises(TypeError, match="gone through only once"):
            call(model, data=batches(), **more, **options)
    assert not taken


def test_fine_tuning_selects_layers_by_type_and_predicate(model, image):
    def tuned(layers):
        small = decomp.tucker(model, ranks=4)
        report = decomp.finetune_layerwise(small, model, [image] * 3, steps=2, layers=layers, progress=False)
        return list(report)

    assert tuned(nn.Linear) == tuned(SVDLinear) == tuned([nn.Linear]) == ["4"]
    assert tuned(["0", nn.Linear]) == ["0", "4"]
    assert tuned(lambda name, layer: isinstance(layer, nn.Conv2d)) == ["0", "2"]
    for nothing in (nn.Conv3d, "nothing", lambda name, layer: False):
        with pytest.raises(ValueError, match=r"matches no factorized layer; .*'0', '2', '4'"):
            tuned(nothing)
    with pytest.raises(TypeError, match="layers=5: write a glob"):
        tuned(5)


def test_calls_work_where_meta_is_the_default_device(model, image):
    dense = decomp.tucker(model, ranks=4, data=[image, image])
    with torch.device("meta"):
        small = decomp.tucker(model, ranks=4, data=[image, image])
        statistics = decomp.calibrate(model, [image], loss="output")
        whitened = decomp.plan(model, "svd_input", 4, data=[image, image]).apply(model)
        profile = decomp.profile(model, image)
        timed = decomp.plan(model, example_inputs=image, seconds=1.0)
    for one, other in zip(small.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(parameter.is_meta for parameter in whitened.parameters())
    assert statistics["0"].importance > 0
    assert profile.total.seconds > 0
    assert timed.seconds.before > 0


def test_a_plan_from_json_says_the_same_of_ranks_and_of_budgets(model):
    plan = decomp.Plan.from_json(decomp.plan(model, ranks=4).to_json())
    for change in (lambda: plan.with_ranks("0", 3), lambda: plan.with_budget(params=0.5)):
        with pytest.raises(ValueError, match=r"holds no spectra: make an editable one with decomp.plan\(model"):
            change()
    with pytest.raises(ValueError, match="with_budget needs one of macs=, params="):
        plan.with_budget()
    dense = decomp.plan(model, ranks=4).keep_dense("*")
    with pytest.raises(ValueError, match="no layer is left to choose for"):
        dense.with_budget(params=0.5)
    with pytest.raises(ValueError, match="no layer of this plan can be decomposed: never decomposed"):
        decomp.plan(nn.LSTMCell(4, 4)).with_budget(params=0.5)


def test_little_gain_on_the_whole_names_what_stands_in_the_way():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(8, 64, 64))
            self.out = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.out(torch.einsum("bi,eio->beo", x, self.experts).sum(1))

    x = torch.randn(1, 64)
    plan = decomp.plan(Bank(), ranks=4, example_inputs=x)
    line = plan.table(width=200).splitlines()[-1]
    assert line == "little is saved: 90% of the MACs stay, 89 % in the model itself (no method supports Bank)"
    params = decomp.plan(Bank(), ranks=4)
    assert "little is saved: 90% of the parameters stay, 89 % in" in params.table(width=200)
    assert "little is saved" not in decomp.plan(nn.Sequential(nn.Linear(64, 64)), ranks=4).table(width=200)
    budget = decomp.plan(nn.Sequential(nn.Linear(64, 64)), params=0.9)
    assert "little is saved" not in budget.table(width=200), "it is what was asked for"


def test_the_digits_say_what_to_install(monkeypatch):
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "sklearn":
                raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'decomp\[demo\]'"):
        decomp.digits.load_digits()
