"""Attention with packed projections: unpacked exactly, planned as four layers, and packed again."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import decomp
from decomp.layers import SVDLinear, UnpackedAttention
from decomp.methods import METHODS
from decomp.network.flops import observe
from decomp.network.unpacking import unpacked

PROJECTIONS, projections_of = UnpackedAttention.roles, UnpackedAttention.weights_of
LENGTH, BATCH = 5, 3
NO_WARNINGS = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")


def attention(dtype=torch.float64, embed=8, heads=2, **options):
    layer = nn.MultiheadAttention(embed, heads, dtype=dtype, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(layer, sources=LENGTH, batched=True):
    """Query, key and value of the sizes that a layer takes."""
    for length, size in ((LENGTH, layer.embed_dim), (sources, layer.kdim), (sources, layer.vdim)):
        shape = (BATCH, length, size) if layer.batch_first else (length, BATCH, size)
        yield torch.randn(shape if batched else (length, size), dtype=torch.float64)


def mask(kind, *shape):
    if kind is None:
        return None
    values = torch.randn(shape, dtype=torch.float64)
    return values > 1.2 if kind == "bool" else values


def masks(batched, sources):
    """Pairs of attn_mask and key_padding_mask, boolean and floating, for every shape that torch takes."""
    many = 2 * BATCH if batched else 2
    padding = (BATCH, sources) if batched else (sources,)
    for kind, dimensions, padded in itertools.product(("bool", "float"), (0, 2, 3), (False, True)):
        shape = {2: (LENGTH, sources), 3: (many, LENGTH, sources)}.get(dimensions)
        yield mask(kind, *shape) if shape else None, mask(kind, *padding) if padded else None


def agree(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        assert (result is None) == (wanted is None)
        if wanted is not None:
            assert result.shape == wanted.shape
            torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12, equal_nan=True)


OPTIONS = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn", "batch_first"), values, strict=True)) | sizes
    for *values, sizes in itertools.product(*((True, False),) * 4, ({}, {"kdim": 6}, {"kdim": 6, "vdim": 10}))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(value) for value in o.values()))
def test_unpacked_attention_is_that_of_torch(options):
    layer = attention(**options, dropout=0.3)
    own = UnpackedAttention(layer)
    for training, batched, sources in ((True, True, 4), (False, True, LENGTH), (False, False, 4)):
        query, key, value = inputs(layer, sources, batched)
        layer.train(training)
        own.train(training)
        for (attn_mask, padding), (need, average) in itertools.product(
            masks(batched, sources), ((True, True), (True, False), (False, True))
        ):
            given = {"attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": need}
            results = []
            for module in (own, layer):
                torch.manual_seed(1)  # of the dropout
                results.append(module(query, key, value, average_attn_weights=average, **given))
            agree(*results)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_the_causal_hint_is_used_as_torch_uses_it(need_weights, padded, extra):
    layer = attention(batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    own = UnpackedAttention(layer)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 3:] = True
    given = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
    given |= {"key_padding_mask": padding} if padded else {}
    arguments = list(inputs(layer))
    agree(own(*arguments, **given), layer(*arguments, **given))


@NO_WARNINGS
def test_arguments_that_do_not_fit_are_named():
    own = UnpackedAttention(attention())
    query, key, value = inputs(own)
    with pytest.raises(RuntimeError, match="give the causal mask as attn_mask"):
        own(query, key, value, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask has shape \(5, 4\), it must be \(5, 5\) or \(6, 5, 5\)"):
        own(query, key, value, attn_mask=torch.zeros(5, 4))
    with pytest.raises(RuntimeError, match=r"key_padding_mask has shape \(5, 3\), it must be \(3, 5\)"):
        own(query, key, value, key_padding_mask=torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"attn_mask is torch\.uint8"):
        own(query, key, value, attn_mask=torch.zeros(5, 5, dtype=torch.uint8))
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(TypeError, match="not nested tensors"):
        own(nested, nested, nested)


def test_what_torch_reads_of_attention_is_there():
    layer = attention(batch_first=True, dropout=0.1)
    own = UnpackedAttention(layer)
    for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(own, name) == getattr(layer, name)
    assert own._qkv_same_embed_dim
    assert torch.equal(own.in_proj_weight, layer.in_proj_weight)
    assert torch.equal(own.in_proj_bias, layer.in_proj_bias)
    assert own.q_proj_weight is own.k_proj_weight is own.v_proj_weight is own.bias_k is None
    other = attention(kdim=6, bias=False)
    own = UnpackedAttention(other)
    assert own.in_proj_weight is own.in_proj_bias is None
    assert torch.equal(own.k_proj_weight, other.k_proj_weight)


def factorized_attention(layer, ranks):
    parts = {}
    for role, rank in ranks.items():
        weight, bias = projections_of(layer)[role]
        dense = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype)
        dense.weight.data = weight.detach().clone()
        if bias is not None:
            dense.bias.data = bias.detach().clone()
        parts[role] = SVDLinear.from_factors(dense, METHODS["svd"].factors(dense.weight[None].detach(), (rank,)))
    return UnpackedAttention(layer, parts)


@pytest.mark.parametrize("options", OPTIONS[::5], ids=lambda o: "-".join(str(value) for value in o.values()))
def test_full_ranks_give_the_attention_back_and_lower_ones_truncate_each_projection(options):
    layer = attention(**options)
    query, key, value = inputs(layer, 4)
    full = {role: min(weight.shape) for role, (weight, _) in projections_of(layer).items()}
    agree(factorized_attention(layer, full)(query, key, value), layer(query, key, value))
    ranks = {"q_proj": 2, "v_proj": 3, "out_proj": 5}  # keys stay dense
    small = factorized_attention(layer, ranks)
    truncated = copy.deepcopy(layer)
    with torch.no_grad():
        for role, (weight, _) in projections_of(truncated).items():
            if role in ranks:
                left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
                values[ranks[role] :] = 0
                weight.copy_(torch.from_numpy((left * values) @ right))
    agree(small(query, key, value), truncated(query, key, value))
    assert type(small.k_proj) is nn.Linear


def test_gradients_reach_inputs_masks_and_every_factor():
    small = factorized_attention(attention(embed=4, add_bias_kv=True), dict.fromkeys(PROJECTIONS, 2))
    given = [torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    added = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in small.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in small.parameters()]

    def run(query, key, value, attn_mask, *values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(small, weights, (query, key, value), {"attn_mask": attn_mask})

    assert torch.autograd.gradcheck(run, (*given, added, *parameters))


class PatchAttention(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, size, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attn = nn.MultiheadAttention(size, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, size=32, heads=4, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, size, 4, stride=4)
        self.blocks = nn.Sequential(*(PatchAttention(size, heads) for _ in range(depth)))
        self.head = nn.Linear(size, 10)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


IMAGES = torch.randn(4, 3, 16, 16)


def counted_by_hand(model, batch):
    """MACs of all linear layers and convolutions by hooks, and of the two products of every attention."""
    total = 0

    def add(module, args, output):
        nonlocal total
        if isinstance(module, UnpackedAttention | nn.MultiheadAttention):
            length, sources = (args[place].numel() // args[place].shape[-1] // IMAGES.shape[0] for place in (0, 1))
            total += 2 * IMAGES.shape[0] * length * sources * module.embed_dim
            if isinstance(module, nn.MultiheadAttention):
                total += 4 * args[0].numel() * module.embed_dim
        elif isinstance(module, nn.Linear):
            total += args[0].numel() * module.out_features
        else:
            total += output.numel() * module.weight[0].numel()

    kinds = (nn.Conv2d, UnpackedAttention, nn.MultiheadAttention)
    modules = [m for m in model.modules() if type(m) is nn.Linear or isinstance(m, kinds)]
    handles = [module.register_forward_hook(add) for module in modules]
    with torch.no_grad():
        model.train()(batch)
    for handle in handles:
        handle.remove()
    return total


def test_a_vision_transformer_is_within_its_budget():
    model = ViT()
    small = decomp.compress(model, IMAGES, macs=0.5)
    plan = small.decomp_plan
    assert {f"blocks.0.attn.{role}" for role in PROJECTIONS} <= set(plan)
    assert any(plan[f"blocks.{i}.attn.{role}"].ranks for i in (0, 1) for role in PROJECTIONS)
    assert plan.macs.before == counted_by_hand(model, IMAGES)
    assert plan.macs.after == counted_by_hand(small, IMAGES) == observe(small, IMAGES, {}).total_macs
    assert plan.macs.after <= 0.5 * plan.macs.before
    assert plan.params.after == sum(p.numel() for p in small.parameters())
    assert plan.params.before == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("ranks", ["vbmf", decomp.ranks.energy(0.6), 4, (6, 3)], ids=repr)
def test_every_rule_chooses_the_ranks_of_projections_as_of_linear_layers(ranks, monkeypatch):
    monkeypatch.setattr("decomp.planning.output_check.MOST_ERROR", float("inf"))  # the rule alone
    model = ViT()
    weights = projections_of(model.blocks[0].attn)
    with torch.no_grad():  # a planted rank of 3
        for weight, _ in weights.values():
            weight.copy_(torch.randn(32, 3) @ torch.randn(3, 32) + 0.01 * torch.randn(32, 32))
    plan = decomp.plan(model, "tucker", ranks, example_inputs=IMAGES)
    for role, (weight, bias) in weights.items():
        linear = nn.Linear(32, 32)
        linear.weight.data, linear.bias.data = weight.detach().clone(), bias.detach().clone()
        alone = decomp.plan(nn.Sequential(linear), "tucker", ranks)["0"]
        choice = plan[f"blocks.0.attn.{role}"]
        assert (choice.method, choice.ranks, choice.error) == (
            alone.method,
            alone.ranks,
            pytest.approx(alone.error),
        )
        assert choice.macs.before == 4 * 16 * 32 * 32


@NO_WARNINGS
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_encoder_and_decoder_of_torch_run_factorized(batch_first, norm_first):
    model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    small = decomp.svd(model, ranks={"*": 8, "*.k_proj": 4, "encoder.layers.1.self_attn.*": 6})
    plan = small.decomp_plan
    assert plan["decoder.layers.0.multihead_attn.k_proj"].ranks == (4,)
    assert plan["encoder.layers.1.self_attn.k_proj"].ranks == (6,)
    assert plan["decoder.layers.1.self_attn.out_proj"].ranks == (8,)
    source, target = torch.randn(BATCH, 6, 32), torch.randn(BATCH, 5, 32)
    padding = torch.zeros(BATCH, 6, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5) < 0
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    given = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}
    expected = decomp.densify(small)(source, target, **given)
    for training, guard in itertools.product(
        (True, False), (torch.enable_grad, torch.no_grad, torch.inference_mode)
    ):
        with guard():
            result = small.train(training)(source, target, **given)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@NO_WARNINGS
def test_attention_alone_keeps_the_fused_path_of_its_encoder_away():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    small = decomp.svd(model, ranks=8, layers="layers.1.self_attn.v_proj")
    assert isinstance(small.layers[0].self_attn, nn.MultiheadAttention), "nothing in it is replaced"
    assert small.layers[0].activation_relu_or_gelu == 1
    assert small.layers[1].activation_relu_or_gelu == 0
    assert not small.use_nested_tensor
    ran = []
    small.layers[1].self_attn.v_proj.reduce.register_forward_hook(lambda *_: ran.append(1))
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        result = small(x, src_key_padding_mask=padding)
        expected = decomp.densify(small).train()(x, src_key_padding_mask=padding)
    assert ran
    torch.testing.assert_close(result[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


@NO_WARNINGS
def test_the_view_that_is_planned_on_calls_every_projection_of_an_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    view, x = unpacked(model), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        torch.testing.assert_close(
            view(x, src_key_padding_mask=padding)[~padding], model(x, src_key_padding_mask=padding)[~padding]
        )
    assert model.use_nested_tensor
    assert not view.use_nested_tensor


def projections(plan):
    return {name for name, choice in plan.items() if choice.ranks}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"layers": nn.MultiheadAttention}, {f"blocks.{i}.attn.{role}" for i in (0, 1) for role in PROJECTIONS}),
        ({"layers": "blocks.1.attn"}, {f"blocks.1.attn.{role}" for role in PROJECTIONS}),
        ({"layers": "*.out_proj"}, {"blocks.0.attn.out_proj", "blocks.1.attn.out_proj"}),
        ({"layers": ["*.attn", nn.Conv2d], "exclude": "*.[qk]_proj"}, None),
        ({"exclude": [nn.MultiheadAttention, "patches", "head", "*.mlp.*"]}, set()),
        (
            {"layers": lambda name, module: name.endswith("attn.v_proj")},
            {f"blocks.{i}.attn.v_proj" for i in (0, 1)},
        ),
    ],
    ids=["type", "glob of the whole", "glob of a part", "several", "exclude", "predicate"],
)
def test_projections_are_selected_by_their_names_and_by_their_attention(selection, expected):
    if expected is None:
        expected = {f"blocks.{i}.attn.{role}" for i in (0, 1) for role in ("v_proj", "out_proj")} | {"patches"}
    assert projections(decomp.plan(ViT(), "tucker", 8, **selection)) == expected


def test_a_rank_for_each_projection_and_dense_ones_with_a_reason():
    ranks = {"blocks.0.attn.q_proj": 2, "blocks.0.attn.v_proj": 8, "blocks.1.attn.out_proj": 20}
    plan = decomp.plan(ViT(), "svd", ranks, example_inputs=IMAGES)
    assert plan["blocks.0.attn.q_proj"].ranks == (2,)
    assert "not cheaper at 20" in plan["blocks.1.attn.out_proj"].reason
    assert plan["blocks.0.attn.k_proj"].reason == "no glob of ranks= matches it"
    small = plan.keep_dense("*.q_proj").with_ranks("*.0.attn.v_proj", 5).apply(ViT())
    assert isinstance(small.blocks[1].attn, nn.MultiheadAttention)
    own = small.blocks[0].attn
    assert {role: getattr(part, "ranks", None) for role, part in own.named_children()} == {
        "q_proj": None,
        "k_proj": None,
        "v_proj": (5,),
        "out_proj": None,
    }


def state_of(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: (module.training, sorted(vars(module))) for name, module in model.named_modules()}
    return tensors, flags, [type(module) for module in model.modules()]


def test_the_given_model_is_untouched_and_shares_nothing_with_the_result():
    model = ViT().eval()
    before, random = state_of(model), torch.get_rng_state()
    data = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    decomp.svd(model, ranks=6, example_inputs=IMAGES)
    assert torch.equal(random, torch.get_rng_state())
    small = decomp.svd(model, ranks=6, data=data, example_inputs=IMAGES)
    after = state_of(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    mine = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in small.state_dict().values()}
    small = decomp.svd(model, ranks=6, layers="*.q_proj")  # dense projections are copies as well
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in small.state_dict().values()}


def test_in_place_only_attention_with_a_replaced_projection_changes():
    model = ViT()
    first, second = (block.attn for block in model.blocks)
    x = torch.randn(2, 5, 32)
    expected = first(x, x, x)[0]
    assert decomp.svd(model, ranks={"blocks.0.attn.k_proj": 4}, inplace=True) is model
    assert model.blocks[1].attn is second
    own = model.blocks[0].attn
    assert isinstance(own, UnpackedAttention)
    own.k_proj = own.k_proj.to_dense()
    own.k_proj.weight.data = first.in_proj_weight.data[32:64].clone()
    torch.testing.assert_close(own(x, x, x)[0], expected)


def test_attention_under_two_names_and_as_the_whole_model():
    model = nn.Module()
    model.a = nn.MultiheadAttention(32, 4)
    model.b = nn.ModuleList([model.a])
    small = decomp.svd(model, ranks=4)
    assert set(small.decomp_plan) == {f"a.{role}" for role in PROJECTIONS}
    assert small.a is small.b[0]
    assert isinstance(small.a, UnpackedAttention)
    alone = decomp.svd(nn.MultiheadAttention(32, 4), ranks=4)
    assert set(alone.decomp_plan) == set(PROJECTIONS)
    assert isinstance(alone, UnpackedAttention)
    assert type(decomp.densify(alone)) is nn.MultiheadAttention


OPTIONS_OF_ROUND_TRIPS = [
    {},
    {"bias": False, "batch_first": True},
    {"kdim": 24, "vdim": 40},
    {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.25},
]


@pytest.mark.parametrize("options", OPTIONS_OF_ROUND_TRIPS, ids=lambda o: "-".join(o) or "plain")
def test_back_to_packed_attention(options):
    model = nn.ModuleDict({"self_attn": attention(embed=32, heads=4, **options)})
    model["self_attn"].tag = "mine"
    small = decomp.svd(model, ranks={"self_attn.q_proj": 4, "self_attn.out_proj": 6})
    dense = decomp.densify(small)
    back, own = dense["self_attn"], small["self_attn"]
    assert type(back) is nn.MultiheadAttention
    assert vars(back).keys() == vars(model["self_attn"]).keys()
    assert type(back.out_proj) is type(model["self_attn"].out_proj)
    assert back.tag == own.tag == "mine"
    assert {n: p.shape for n, p in back.named_parameters()} == {
        n: p.shape for n, p in model["self_attn"].named_parameters()
    }
    arguments = list(inputs(back, 4))
    agree(back.eval()(*arguments), own.eval()(*arguments))
    for role in ("k_proj", "v_proj"):
        assert torch.equal(projections_of(back)[role][0], projections_of(model["self_attn"])[role][0])
    assert set(decomp.plan(dense, "svd", 4)) == {f"self_attn.{role}" for role in PROJECTIONS}, "in stages"
    inplace = decomp.densify(small, inplace=True)
    assert inplace is small
    assert type(small["self_attn"]) is nn.MultiheadAttention


@pytest.mark.parametrize("options", OPTIONS_OF_ROUND_TRIPS, ids=lambda o: "-".join(o) or "plain")
def test_round_trips_of_state_plan_copy_and_pickle(options):
    def make():
        return nn.ModuleDict({"self_attn": attention(embed=32, heads=4, **options)})

    small = decomp.svd(make(), ranks={"*.q_proj": 4, "*.v_proj": 6}).eval()
    again = decomp.Plan.from_json(small.decomp_plan.to_json()).build(make())
    assert list(again.state_dict()) == list(small.state_dict())
    again.load_state_dict(small.state_dict())
    given = list(inputs(small["self_attn"], 4))
    expected = small["self_attn"](*given)
    for other in (again.eval(), copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        agree(other["self_attn"](*given), expected)
        assert str(other.decomp_plan) == str(small.decomp_plan)
    with torch.device("meta"):
        unreal = make()
    assert (
        decomp.Plan.from_json(small.decomp_plan.to_json()).build(unreal)["self_attn"].v_proj.reduce.weight.is_meta
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_flags_and_frozen_parameters_are_kept(dtype):
    model = nn.ModuleDict({"a": attention(dtype, 32, 4, add_bias_kv=True), "b": attention(dtype, 32, 4)})
    model["a"].in_proj_weight.requires_grad_(False)
    model["b"].out_proj.requires_grad_(False)
    model["a"].eval()
    small = decomp.svd(model, ranks={"*.q_proj": 4, "*.out_proj": 4})
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert [m.training for m in small["a"].modules()] == [False] * len(list(small["a"].modules()))
    assert all(m.training for m in small["b"].modules())
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {
        *("a.q_proj.reduce.weight", "a.q_proj.expand.weight", "a.k_proj.weight", "a.v_proj.weight"),
        *("b.out_proj.reduce.weight", "b.out_proj.expand.weight", "b.out_proj.expand.bias"),
    }
    back = decomp.densify(small)
    assert {name for name, p in back.named_parameters() if not p.requires_grad} == {
        name for name, p in model.named_parameters() if not p.requires_grad
    }
    assert [m.training for m in back.modules()] == [m.training for m in model.modules()]
    assert {p.dtype for p in small.half().parameters()} == {torch.float16}


class Own(nn.MultiheadAttention):
    pass


class Adapted(nn.Linear):
    pass


def refused():
    hooked, child, replaced, masked, burdened, tied, used = (nn.MultiheadAttention(16, 2) for _ in range(7))
    hooked.register_forward_hook(lambda *_: None)
    child.out_proj.register_forward_hook(lambda *_: None)
    replaced.forward = lambda *args: args
    prune.l1_unstructured(masked, "in_proj_weight", 0.5)
    burdened.scale = nn.Parameter(torch.ones(1))
    tied.out_proj.weight = nn.Parameter(torch.randn(16, 16))
    yield hooked, "has hooks", []
    yield child, "has hooks", []
    yield replaced, "forward was replaced", []
    yield masked, "in_proj_weight_mask", []
    yield burdened, "holds more than the weights that are unpacked: scale", []
    yield Own(16, 2), "Own, a subclass of MultiheadAttention", []
    yield (
        parametrizations.weight_norm(nn.MultiheadAttention(16, 2), "in_proj_weight"),
        "remove_parametrizations",
        [],
    )
    partner = nn.Linear(16, 16)
    partner.weight = tied.out_proj.weight
    yield tied, "its weight is tied", [partner]
    packed_partner = nn.Linear(16, 48)
    shared = nn.MultiheadAttention(16, 2)
    packed_partner.weight = shared.in_proj_weight
    yield shared, "its weight is tied", [packed_partner]
    adapted = nn.MultiheadAttention(16, 2)
    adapted.out_proj = Adapted(16, 16)
    yield adapted, "Adapted, not a torch.nn.Linear", []
    yield used, "its out_proj is a layer of another module as well", [used.out_proj]
    yield nn.MultiheadAttention(16, 2, dtype=torch.complex64), "complex64", []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("layer", "words", "others"), list(refused()), ids=lambda value: str(value)[:30])
def test_attention_that_must_not_be_replaced_stays_packed_with_a_reason(layer, words, others):
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(32, 32), "others": nn.ModuleList(others)})
    plan = decomp.plan(model, ranks=4, layers=["odd", "plain"])
    assert words in plan["odd"].reason
    small = plan.apply(model, inplace=True)
    assert small["odd"] is layer
    ready = decomp.plan(nn.ModuleDict({"odd": nn.MultiheadAttention(16, 2)}), ranks=2)
    with pytest.raises(ValueError, match=rf"layer 'odd\.q_proj' cannot be replaced: .*{words}"):
        ready.apply(model)


def test_a_model_that_cannot_be_copied_keeps_its_attention():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "fc": nn.Linear(32, 32)})
    model.lock = (item for item in ())  # a generator cannot be copied
    plan = decomp.plan(model, ranks=4)
    assert plan["a"].reason == "its weights are packed, and the model cannot be copied to unpack them"
    assert projections(plan) == {"fc"}


def test_tensors_that_hang_on_a_module_do_not_keep_it_packed():
    model = nn.Sequential(nn.MultiheadAttention(16, 2))
    model.last = torch.ones(3, requires_grad=True) * 2  # deepcopy refuses tensors that have a history
    assert set(decomp.plan(model, ranks=2)) == {f"0.{role}" for role in PROJECTIONS}
    assert unpacked(model).last is model.last


def test_planning_and_calibration_work_in_inference_mode():
    model, data = Tokens(), tokens_of_rank_6()
    with torch.inference_mode():
        plan = decomp.plan(model, "svd", 6, data=decomp.calibrate(model, data, loss="output"))
        small = plan.apply(model)
    small(data[0]).sum().backward()
    assert small.attn.q_proj.reduce.weight.grad.abs().sum() > 0


def test_a_budget_of_seconds_times_projections(seconds_of_macs):
    model = ViT().eval()
    whole = decomp.plan(model, seconds=1.0, example_inputs=IMAGES, layers=nn.MultiheadAttention)
    plan = whole.with_budget(seconds=0.9 * whole.seconds.before)
    assert projections(plan)
    assert plan.seconds.after <= 0.9 * plan.seconds.before


class Tokens(nn.Module):
    """Correlated tokens into attention, so that the metric of the data differs from that of the weight."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(48, 4, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def tokens_of_rank_6(count=7):
    basis = torch.randn(6, 48)
    return [torch.randn(4, 16, 6) @ basis + 0.1 * torch.randn(4, 16, 48) for _ in range(count)]


def test_data_reach_the_projections():
    model, (x, *data) = Tokens().eval(), tokens_of_rank_6()
    statistics = decomp.calibrate(model, data, held_out=False)
    assert set(statistics) == {f"attn.{role}" for role in PROJECTIONS}
    tokens = torch.cat([batch.flatten(0, 1) for batch in data]).double()
    centred = tokens - tokens.mean(0)
    expected = centred.T @ centred / len(tokens)
    torch.testing.assert_close(statistics["attn.k_proj"].inputs[0], expected, rtol=1e-5, atol=1e-5)  # float32
    plain, informed = decomp.svd(model, ranks=6), decomp.svd(model, ranks=6, data=statistics)

    def error(small):
        with torch.no_grad():
            return float((small(x) - model(x)).norm() / model(x).norm())

    assert error(informed) < 0.5 * error(plain)
    choice = informed.decomp_plan["attn.q_proj"]
    assert choice.output_error < 0.5 * choice.error


def test_sequential_repair_and_both_kinds_of_fine_tuning_train_projections():
    model, (x, *data) = Tokens().eval(), tokens_of_rank_6()

    def error(small):
        with torch.no_grad():
            return float((small(x) - model(x)).norm() / model(x).norm())

    sequential = decomp.svd(model, ranks={"*.q_proj": 3, "*.out_proj": 6}, data=data, sequential=True)
    assert type(sequential.attn.k_proj) is nn.Linear
    plain = decomp.svd(model, ranks={"*.q_proj": 3, "*.out_proj": 6})
    assert error(sequential) < error(plain)
    report = decomp.repair(plain, model, data, progress=False)
    assert set(report) == {"attn.q_proj", "attn.out_proj"}
    assert report["attn.out_proj"].error_after < report["attn.out_proj"].error_before
    small = decomp.svd(model, ranks=4)
    trained = decomp.finetune_layerwise(small, model, data, steps=40, progress=False)
    assert set(trained) == {f"attn.{role}" for role in PROJECTIONS}
    assert all(each.error_after < each.error_before for each in trained.values())
    small = decomp.svd(nn.Sequential(model), ranks=4)
    blocks = decomp.finetune_layerwise(small, nn.Sequential(model), data, steps=40, blocks="0", progress=False)
    assert blocks["0"].error_after < blocks["0"].error_before
    before = error(small[0])
    decomp.finetune(small, data, teacher=nn.Sequential(model), steps=20, progress=False)
    assert error(small[0]) < before


def test_in_sequence_attention_without_a_replaced_projection_stays_packed():
    model = ViT().eval()
    data = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    small = decomp.svd(model, ranks={"blocks.0.attn.v_proj": 4}, data=data, sequential=True)
    assert isinstance(small.blocks[1].attn, nn.MultiheadAttention)
    assert torch.equal(small.blocks[1].attn.in_proj_weight, model.blocks[1].attn.in_proj_weight)
    assert small.blocks[0].attn.v_proj.ranks == (4,)


def test_sensitivities_budgets_trade_offs_and_the_explorer_know_projections():
    model = ViT().eval()
    data = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    names = {f"blocks.{i}.attn.{role}" for i in (0, 1) for role in PROJECTIONS}
    weights = decomp.sensitivity(model, data, batches=1)
    fisher = decomp.sensitivity(model, data, batches=1, loss=lambda net, batch: net(batch).square().sum())
    assert names <= weights.keys() == fisher.keys()
    assert all(weights[name] > 0 and fisher[name] > 0 for name in names)
    statistics = decomp.calibrate(model, data, loss="output")
    plan = decomp.plan(model, macs=0.6, example_inputs=IMAGES, data=statistics)
    assert all(candidates[0].importance > 0 for name, candidates in plan.candidates.items() if name in names)
    curve = decomp.tradeoff(model, IMAGES, budgets=(0.6,), progress=False)
    assert curve.points[0].costs["macs"] <= 0.6 * curve.dense.costs["macs"]
    state = decomp.explorer.state.Exploration(model, IMAGES, timed=False, progress=False)
    assert "svd" in state.methods_of("blocks.0.attn.q_proj")
    state.choose_ranks("blocks.0.attn.q_proj", (4,))
    assert state.plan["blocks.0.attn.q_proj"].ranks == (4,)


def test_profiles_and_comparisons_show_the_whole_attention():
    model = ViT()
    small = decomp.svd(model, ranks={"blocks.0.attn.q_proj": 4})
    comparison = decomp.compare(small, model, IMAGES)
    row = comparison.small.rows["blocks.0.attn"]
    assert row.layer == "UnpackedAttention q_proj (4,), k_proj dense, v_proj dense, out_proj dense"
    assert row.params == comparison.dense.rows["blocks.0.attn"].params - 32 * 32 + 2 * 4 * 32
    assert row.macs == comparison.dense.rows["blocks.0.attn"].macs - 64 * (32 * 32 - 2 * 4 * 32)
    assert "blocks.0.attn " in comparison.table(width=200)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_unpacking_changes_no_count(batch_first, need_weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=batch_first)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=need_weights)[0]

    model, x = Net(), torch.randn(3, 5, 16)
    view = unpacked(model)
    assert isinstance(view.attn, UnpackedAttention)
    assert isinstance(model.attn, nn.MultiheadAttention)
    assert view.attn.k_proj.weight.data_ptr() == model.attn.in_proj_weight[16:].data_ptr()
    assert observe(view, x, {}).total_macs == observe(model, x, {}).total_macs
    length, batch = (5, 3) if batch_first else (3, 5)
    assert observe(view, x, {}).total_macs == 4 * 15 * 16 * 16 + 2 * batch * length**2 * 16


def test_factorized_attention_is_exported_and_compiled():
    model = ViT().eval()
    small = decomp.svd(model, ranks=6)
    program = torch.export.export(small, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), small(IMAGES))
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), small(IMAGES))
