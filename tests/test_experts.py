"""Fused experts of transformers: unpacked exactly, one rank for all experts of a weight, within their budgets."""

import copy
import itertools
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import decomp
from decomp.calibration.moments import LayerSums
from decomp.data.activations import Activations, reached_tails
from decomp.data.batches import Batches
from decomp.data.suspended import HeldActivations, HeldExamples
from decomp.layers import ExpertLinear, SVDExpertLinear, UnpackedExperts, group_kernels
from decomp.methods import METHODS
from decomp.network.flops import observe
from decomp.network.unpacking import unpacked

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
TOKENS = {"input_ids": torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))}
ROLES = UnpackedExperts.roles


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=64, num_local_experts=4)).eval()


def qwen2_moe():
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **sizes, num_experts=6, decoder_sparse_step=1)).eval()


MODELS = [mixtral, qwen2_moe]


def experts_of(model, layer=0):
    return model.model.layers[layer].mlp.experts


def spread(model):
    """Weights large enough for the outputs to depend on every expert."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if "embed" not in name else 1.0)
    return model


def expert_linear(experts=4, inputs=8, outputs=12, dtype=torch.float64):
    return ExpertLinear(experts, inputs, outputs, dtype=dtype)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1, 3), (2,)])
def test_each_row_is_multiplied_by_the_weight_of_its_expert(implementation, dtype, used):
    layer = expert_linear(dtype=dtype)
    rows, experts = torch.randn(9, 8, dtype=dtype), torch.tensor(used)[torch.randint(len(used), (9,))]
    weights = layer.weight.view(4, 12, 8)
    expected = torch.stack([weights[expert] @ row for row, expert in zip(rows, experts, strict=True)])
    torch.testing.assert_close(layer(rows, experts, implementation), expected)
    assert layer(rows[:0], experts[:0], implementation).shape == (0, 12)


@pytest.mark.parametrize("implementation", [None, "batched_mm"])
def test_full_rank_is_exact_and_a_lower_rank_truncates_every_expert(implementation):
    layer = expert_linear()
    rows, experts = torch.randn(9, 8, dtype=torch.float64), torch.randint(4, (9,))
    kernels = group_kernels(layer).detach()
    assert METHODS["svd"].limits(kernels) == (8,)
    analysis = METHODS["svd"].analyse(kernels)
    for rank in range(1, 9):
        small = SVDExpertLinear.from_factors(layer, METHODS["svd"].factors(kernels, (rank,)))
        truncated = []
        for weight in layer.weight.detach().view(4, 12, 8).numpy():
            left, values, right = np.linalg.svd(weight, full_matrices=False)
            truncated.append((left[:, :rank] * values[:rank]) @ right[:rank])
        stacked = torch.from_numpy(np.concatenate(truncated))
        torch.testing.assert_close(small.dense_weight(), stacked, rtol=0, atol=1e-12)
        expected = copy.deepcopy(layer)
        expected.weight.data = stacked
        torch.testing.assert_close(
            small(rows, experts, implementation), expected(rows, experts), rtol=0, atol=1e-12
        )
        weight = layer.weight.detach()
        error = float((stacked - weight).norm() / weight.norm())
        assert analysis.error((rank,)) == pytest.approx(error, abs=1e-7)
    torch.testing.assert_close(small(rows, experts), layer(rows, experts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_gradients_reach_rows_and_every_factor(implementation):
    layer = expert_linear(3, 4, 5)
    small = SVDExpertLinear.from_factors(layer, METHODS["svd"].factors(group_kernels(layer).detach(), (2,)))
    experts = torch.tensor([2, 0, 2, 0])  # the second expert has no row
    rows = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def run(rows, reduce, expand):
        weights = {"reduce.weight": reduce, "expand.weight": expand}
        return torch.func.functional_call(small, weights, (rows, experts, implementation))

    factors = [factor.weight.detach().clone().requires_grad_() for factor in (small.reduce, small.expand)]
    assert torch.autograd.gradcheck(run, (rows, *factors))


def test_grouped_products_have_the_gradients_of_the_loop_and_odd_ranks_use_the_loop():
    layer = expert_linear(4, 32, 48, torch.float32)
    rows, experts = torch.randn(20, 32), torch.randint(4, (20,))
    for rank in (8, 5):  # a grouped product needs rows of a multiple of 16 bytes
        small = SVDExpertLinear.from_factors(layer, METHODS["svd"].factors(group_kernels(layer).detach(), (rank,)))
        grads = []
        for implementation in ("grouped_mm", "eager"):
            small.zero_grad()
            small(rows, experts, implementation).square().sum().backward()
            grads.append([factor.weight.grad.clone() for factor in (small.reduce, small.expand)])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    ("implementation", "dtype"),  # torch has no grouped product of float64
    [
        *itertools.product(IMPLEMENTATIONS, [torch.float32]),
        *itertools.product(IMPLEMENTATIONS[::2], [torch.float64]),
    ],
)
def test_unpacked_experts_are_those_of_transformers(make, implementation, dtype):
    model = spread(make()).to(dtype)
    model.set_experts_implementation(implementation)
    view = unpacked(model)
    assert isinstance(experts_of(view), UnpackedExperts)
    assert experts_of(view).config._experts_implementation == implementation
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(view(**TOKENS).logits, model(**TOKENS).logits, **tolerance)
    assert observe(view, TOKENS, {}).total_macs == observe(model, TOKENS, {}).total_macs
    # Full ranks, which no plan chooses: they cost more than the dense weight.
    own = experts_of(view)
    for role in ROLES:
        dense = getattr(own, role)
        limits = METHODS["svd"].limits(group_kernels(dense))
        factors = METHODS["svd"].factors(group_kernels(dense).detach(), limits)
        setattr(own, role, SVDExpertLinear.from_factors(dense, factors))
    tolerance = tolerance if dtype == torch.float32 else {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(view(**TOKENS).logits, model(**TOKENS).logits, **tolerance)


def counted_by_hand(model):
    """MACs of linear layers, routers and experts by hooks, and of the products of attention."""
    total = 0
    tokens = TOKENS["input_ids"].numel()

    def add(module, args, output):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += args[0].numel() * module.out_features
        elif isinstance(module, ExpertLinear):
            total += len(args[0]) * module.in_features * module.out_features
        elif type(module).__name__.endswith("TopKRouter"):
            total += tokens * module.weight.numel()
        else:
            experts = module.gate_up_proj[0].numel() + module.down_proj[0].numel()
            total += tokens * SIZES["num_experts_per_tok"] * experts

    kinds = (nn.Linear, ExpertLinear)
    names = ("TopKRouter", "MoeExperts", "MixtralExperts")
    modules = [m for m in model.modules() if isinstance(m, kinds) or type(m).__name__.endswith(names)]
    handles = [module.register_forward_hook(add) for module in modules]
    model(**TOKENS)
    for handle in handles:
        handle.remove()
    length = TOKENS["input_ids"].shape[1]
    return total + SIZES["num_hidden_layers"] * 2 * tokens * length * SIZES["hidden_size"]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_budget_holds_for_what_runs(make, implementation):
    model = make()
    model.set_experts_implementation(implementation)
    small = decomp.compress(model, TOKENS, macs=0.5)
    plan = small.decomp_plan
    assert any(isinstance(module, SVDExpertLinear) for module in small.modules())
    assert plan.macs.before == counted_by_hand(model)
    assert plan.macs.after == counted_by_hand(small) == observe(small, TOKENS, {}).total_macs
    assert plan.macs.after <= 0.5 * plan.macs.before
    assert plan.params.after == sum(parameter.numel() for parameter in small.parameters())
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = small.generate(**TOKENS, attention_mask=torch.ones(2, 12, dtype=torch.long), **settings)
    assert generated.shape == (2, 16)


def test_the_implementation_can_be_changed_after_compression():
    small = decomp.svd(spread(mixtral()), ranks=8)
    logits = []
    for implementation in IMPLEMENTATIONS:
        small.set_experts_implementation(implementation)
        assert experts_of(small).config._experts_implementation == implementation
        logits.append(small(**TOKENS).logits)
    torch.testing.assert_close(logits[1:], logits[:1] * 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", [decomp.svd, decomp.tucker])
@pytest.mark.parametrize("ranks", [8, "vbmf", decomp.ranks.energy(0.5)], ids=repr)
def test_rules_choose_one_rank_for_all_experts_of_a_weight(call, ranks):
    model = mixtral()
    with torch.no_grad():
        for weight in (experts_of(model).gate_up_proj, experts_of(model).down_proj):
            left, right = torch.randn(*weight.shape[:2], 3), torch.randn(4, 3, weight.shape[2])
            weight.copy_(left @ right + 0.01 * torch.randn_like(weight))
    plan = call(model, ranks=ranks, example_inputs=TOKENS).decomp_plan
    for role in ROLES:
        choice = plan[f"model.layers.0.mlp.experts.{role}"]
        assert choice.method == "svd"
        assert choice.ranks == ((8,) if ranks == 8 else (3,) if ranks == "vbmf" else choice.ranks)
        experts, outputs, inputs = getattr(experts_of(model), role).shape
        (rank,) = choice.ranks
        assert choice.params == (experts * outputs * inputs, experts * rank * (outputs + inputs))
        assert choice.macs == (48 * outputs * inputs, 48 * rank * (outputs + inputs))
        assert choice.layer == f"ExpertLinear {inputs}>{outputs} x{experts}"


def test_experts_are_selected_by_name_and_type_and_may_stay_dense():
    model = mixtral()
    names = {f"model.layers.{i}.mlp.experts.{role}" for i, role in itertools.product((0, 1), ROLES)}
    for selection in (MixtralExperts, "*.experts", ExpertLinear):
        plan = decomp.plan(model, "svd", 8, layers=selection)
        assert {name for name, choice in plan.items() if choice.ranks} == names
    assert not names & {n for n, c in decomp.plan(model, "svd", 8, exclude=MixtralExperts).items() if c.ranks}
    small = decomp.svd(model, ranks={"*.0.mlp.experts.gate_up_proj": 4, "*.1.mlp.experts.down_proj": 30})
    assert "not cheaper at 30" in small.decomp_plan["model.layers.1.mlp.experts.down_proj"].reason
    assert isinstance(experts_of(small, 1), MixtralExperts)
    assert isinstance(experts_of(small).gate_up_proj, SVDExpertLinear)
    assert isinstance(experts_of(small).down_proj, ExpertLinear)


@pytest.mark.parametrize("make", MODELS)
def test_round_trips_and_back_to_fused_experts(make):
    model = spread(make())
    experts_of(model).gate_up_proj.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = decomp.svd(model, ranks={"*.experts.gate_up_proj": 8, "*.o_proj": 4})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mine = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in small.state_dict().values()}
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {
        f"model.layers.0.mlp.experts.gate_up_proj.{factor}.weight" for factor in ("reduce", "expand")
    }
    expected = small(**TOKENS).logits
    again = decomp.Plan.from_json(small.decomp_plan.to_json()).build(make())
    again.load_state_dict(small.state_dict())
    for other in (again, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(**TOKENS).logits, expected)
    dense = decomp.densify(small)
    assert type(experts_of(dense)) is type(experts_of(model))
    assert vars(experts_of(dense)).keys() == vars(experts_of(model)).keys()
    assert experts_of(dense).config is dense.config
    assert list(dense.state_dict()) == list(model.state_dict())
    assert torch.equal(experts_of(dense).down_proj, experts_of(model).down_proj)
    assert not experts_of(dense).gate_up_proj.requires_grad
    torch.testing.assert_close(dense(**TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    staged = decomp.svd(dense, ranks={"*.experts.down_proj": 8})
    assert isinstance(experts_of(staged).gate_up_proj, ExpertLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_half_precision_and_every_mode(dtype, context):
    small = decomp.svd(spread(mixtral()).to(dtype), ranks=8, layers="*.experts")
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    with context():
        logits = small(**TOKENS).logits
        expected = decomp.densify(small)(**TOKENS).logits
    logits, expected = logits.detach().float(), expected.detach().float()
    assert float((logits - expected).norm() / expected.norm()) < 0.1


class OwnGate(MixtralExperts):
    """A gate with numbers of its own and no activation, as in several models of transformers."""

    def __init__(self, config):
        super().__init__(config)
        self.limit = 0.5
        del self.act_fn

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.clamp(max=self.limit).sigmoid() * up


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_gate_is_that_of_the_packed_class(implementation):
    config = MixtralConfig(**SIZES, intermediate_size=64, num_local_experts=4)
    config._experts_implementation = implementation
    model = nn.ModuleDict({"experts": OwnGate(config)})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    view, dense = unpacked(model)["experts"], decomp.densify(decomp.svd(model, ranks=8))["experts"]
    rows, experts, weights = torch.randn(9, 32), torch.randint(4, (9, 2)), torch.rand(9, 2)
    torch.testing.assert_close(view(rows, experts, weights), model["experts"](rows, experts, weights))
    assert type(dense) is OwnGate
    assert dense.limit == 0.5
    assert dense(rows, experts, weights).shape == (9, 32)


def refused():
    def changed(**attributes):
        experts = MixtralExperts(MixtralConfig(**SIZES, intermediate_size=64, num_local_experts=4))
        for name, value in attributes.items():
            setattr(experts, name, value)
        return experts

    yield changed(has_bias=True), "its experts have biases"
    yield changed(has_gate=False), "not gated"
    yield changed(has_post_expert_norm=True), "not gated, or normalized"
    yield changed(is_transposed=True), "stored input first"
    yield changed(_is_expert_parallel=True), "spread over several devices"
    yield changed(num_experts=8), "spread over several devices"
    yield changed(scale=nn.Parameter(torch.ones(1))), "holds more than the weights that are unpacked: scale"
    hooked = changed()
    hooked.register_forward_hook(lambda *_: None)
    yield hooked, "has hooks"


@pytest.mark.parametrize(("experts", "words"), list(refused()), ids=lambda value: str(value)[:20])
def test_other_experts_stay_packed_with_a_reason(experts, words):
    model = nn.ModuleDict({"experts": experts, "fc": nn.Linear(32, 32)})
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    plan = decomp.plan(model, "svd", 4)
    assert words in plan["experts"].reason
    assert plan.apply(model)["experts"].gate_up_proj.dim() == 3


def test_moments_of_experts_are_those_of_their_rows():
    layer = expert_linear(3, 4, 6)
    sums = LayerSums("", layer)
    rows, experts = torch.randn(50, 4, dtype=torch.float64), torch.randint(2, (50,))  # none for the last
    for part in range(0, 50, 10):
        each = slice(part, part + 10)
        given = {"batch": part // 10, "experts": experts[each]}
        sums.add(rows[each], layer(rows[each], experts[each]).detach(), **given)
        sums.add_gradient(rows[each] @ torch.ones(4, 6, dtype=torch.float64), **given)
    moments = sums.moments()
    alone = torch.stack([rows[experts == e].T @ rows[experts == e] / 50 for e in range(3)])
    torch.testing.assert_close(moments.inputs, 0.99 * alone + 0.01 * alone.mean(0))
    assert (torch.linalg.eigvalsh(moments.inputs) > 0).all()
    assert moments.importance > 0
    assert moments.row_metric.isfinite().all()


def test_an_expert_of_nine_times_the_rows_counts_nine_times():
    layer = expert_linear(2, 4, 6)
    sums, experts = LayerSums("", layer), torch.tensor([0] * 90 + [1] * 10)
    rows, grads = torch.ones(100, 4, dtype=torch.float64), torch.ones(100, 6, dtype=torch.float64)
    sums.add(rows, layer(rows, experts).detach(), batch=0, experts=experts)
    sums.add_gradient(grads, batch=0, experts=experts)
    moments = sums.moments()
    first, second = (
        (moments.row_metric[e] @ moments.row_metric[e]).trace() * moments.inputs[e].trace() for e in (0, 1)
    )
    assert float(first / second) == pytest.approx(
        9, rel=0.1
    )  # 1 % are moments of both, 2 % weights of all outputs


def correlated(count=6):
    """Token batches from a small part of the vocabulary."""
    draws = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 9, (4, 12), generator=draws)} for _ in range(count)]


@pytest.mark.parametrize("make", MODELS)
def test_data_lower_the_error_of_the_output_and_weigh_the_experts(make):
    model, data = spread(make()), correlated()
    statistics = decomp.calibrate(model, data, loss="output", progress=False)
    names = {f"model.layers.{i}.mlp.experts.{role}" for i, role in itertools.product((0, 1), ROLES)}
    assert names <= set(statistics)
    plain = decomp.svd(model, ranks=6, layers="*.0.mlp.experts")
    informed = decomp.svd(model, ranks=6, layers="*.0.mlp.experts", data=statistics)
    inputs = []
    handle = experts_of(model).register_forward_pre_hook(lambda module, args: inputs.append(args))
    model(**data[0])
    handle.remove()
    with torch.no_grad():
        dense, *both = (experts_of(each)(*inputs[0]) for each in (model, plain, informed))
    errors = [float((each - dense).norm() / dense.norm()) for each in both]
    assert errors[1] < 0.7 * errors[0]
    choice = informed.decomp_plan["model.layers.0.mlp.experts.gate_up_proj"]
    assert choice.output_error < choice.error
    plan = decomp.plan(model, macs=0.6, data=statistics, objective="network")
    assert plan.macs.after <= 0.6 * plan.macs.before


def test_the_planned_output_error_is_that_of_the_rows():
    model, data = spread(mixtral()), correlated()
    small = decomp.svd(model, ranks=6, layers="*.0.mlp.experts.gate_up_proj", data=data)
    received = []
    view = unpacked(model)
    experts_of(view).gate_up_proj.register_forward_hook(
        lambda module, args, output: received.append((args, output))
    )
    with torch.no_grad():
        for batch in data:
            view(**batch)
        squared = energy = 0.0
        for args, output in received:
            squared += float((experts_of(small).gate_up_proj(*args) - output).square().sum())
            energy += float(output.square().sum())
    planned = small.decomp_plan["model.layers.0.mlp.experts.gate_up_proj"].output_error
    assert planned == pytest.approx((squared / energy) ** 0.5, rel=0.15)  # with 1 % of the moments of all experts


def test_fine_tuning_repair_and_sequence_route_each_row_to_its_expert():
    model, data = spread(mixtral()), correlated()
    small = decomp.svd(model, ranks=6, layers="*.mlp.experts")
    report = decomp.repair(small, model, data, progress=False)
    assert {each.note for each in report.values()} == {"each expert has weights of its own: not refitted"}
    trained = decomp.finetune_layerwise(small, model, data, steps=40, progress=False)
    first = [name for name in trained if ".layers.0." in name]
    assert len(first) == 2
    assert all(trained[name].error_after < trained[name].error_before for name in first)
    assert all(trained[name].error_after <= trained[name].error_before for name in trained)
    blocks = decomp.finetune_layerwise(small, model, data, steps=10, blocks="*.mlp", progress=False)
    assert all(each.error_after <= each.error_before for each in blocks.values())
    sequential = decomp.svd(model, ranks={"*.experts.*": 6, "*.o_proj": 8}, data=data, sequential=True)
    assert isinstance(experts_of(sequential).down_proj, SVDExpertLinear)
    assert experts_of(sequential).down_proj.ranks == (6,)
    weights = decomp.sensitivity(model, data, batches=1, layers="*.experts")
    assert all(weight > 0 for weight in weights.values())


def test_rows_that_the_networks_route_differently_are_left_out_of_the_examples():
    from decomp.data.activations import Activations
    from decomp.data.batches import Batches
    from decomp.network.tracing import Tail

    model = spread(mixtral())
    small = decomp.svd(model, ranks={"*.layers.0.self_attn.*": 4, "*.1.mlp.experts.gate_up_proj": 8})
    dense = unpacked(model)
    layers = [experts_of(each, 1).gate_up_proj for each in (small, dense)]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((*args[:2], output)))
    batches = Batches.in_fixed_order([TOKENS], None)
    (window,) = Activations(small, dense, *layers, Tail(), batches, 2**20).windows()
    (example,) = window.items
    (rows, ours, _), (_, theirs, targets) = seen
    same = ours == theirs
    assert 0 < same.sum() < len(same), "the test needs both"
    assert torch.equal(example.args[0], rows[same])
    assert torch.equal(example.args[1], ours[same])
    assert torch.equal(example.targets[0], targets[same])


def test_profiles_show_the_experts_as_a_whole():
    model = mixtral()
    small = decomp.svd(model, ranks={"*.0.mlp.experts.down_proj": 8})
    comparison = decomp.compare(small, model, TOKENS)
    dense, row = (each.rows["model.layers.0.mlp.experts"] for each in (comparison.dense, comparison.small))
    assert dense.layer == "MixtralExperts"
    assert row.layer == "UnpackedExperts gate_up_proj dense, down_proj (8,)"
    assert dense.macs - row.macs == 48 * (32 * 64 - 8 * (32 + 64))
    assert dense.params - row.params == 4 * (32 * 64 - 8 * (32 + 64))


class Routed(nn.Module):
    """Two layers of experts behind a router."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.first, self.second = expert_linear(4, 8, 8, torch.float32), expert_linear(4, 8, 8, torch.float32)

    def forward(self, x):
        experts = self.router(x).argmax(1)
        return self.second(self.first(x, experts).relu(), experts)


def test_held_passes_keep_the_rows_that_both_networks_send_to_the_same_expert():
    dense = Routed().eval()
    small = decomp.svd(dense, ranks=2, exclude="router")
    with torch.no_grad():
        small.router.weight.add_(0.7 * torch.randn_like(small.router.weight))
    data = Batches([torch.randn(20, 8) for _ in range(4)])
    pairs = {name: (small.get_submodule(name), dense.get_submodule(name)) for name in ("first", "second")}
    tails = reached_tails(dense, data, {name: pair[1] for name, pair in pairs.items()})
    with torch.no_grad(), HeldExamples(small, dense, pairs, tails, data, 2**28) as held:
        for name, pair in pairs.items():
            first = held.activations(name)
            assert isinstance(first, HeldActivations)
            plain = Activations(small, dense, *pair, tails[name], data, 2**28)
            windows = zip(first.windows(), plain.windows(), strict=True)
            examples = [each for ours, theirs in windows for each in zip(ours.items, theirs.items, strict=True)]
            assert len(examples) == 4
            for ours, theirs in examples:
                assert 0 < len(ours.args[1]) < 20
                assert torch.equal(ours.args[1], theirs.args[1])
                assert torch.equal(ours.targets[0], theirs.targets[0])
            held.replace(name, None, small)
