"""What a swap keeps, what is refused, and models of every make."""

import copy
import gc
import pickle
import re
import threading
import weakref

import pytest
import torch
from networks import plant_spectra
from torch import nn
from torch.nn.utils import parametrizations, prune

import decomp
from decomp.layers import Factorized, SVDLinear, TuckerConv


def factorized(model):
    return [name for name, module in model.named_modules() if isinstance(module, Factorized)]


def test_the_given_model_is_untouched_and_shares_nothing_with_the_result():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Linear(32, 32)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    small = decomp.tucker(model, ranks=8)
    for parameter in small.parameters():
        parameter.data.zero_()
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Linear]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not hasattr(model, "decomp_plan")
    assert [module.training for module in small] == [True, False, True]
    assert not shared(model, small)


FIXED = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device)


def shared(one, other):
    """What can be changed and both models lead to: modules, containers, other objects, memory of tensors."""

    def reachable(model):
        found, left = {}, [model]
        while left:
            value = left.pop()
            if isinstance(value, torch.Tensor):
                found[value.untyped_storage().data_ptr()] = value
            elif not isinstance(value, FIXED) and id(value) not in found:
                found[id(value)] = value
                within = value.values() if isinstance(value, dict) else value
                left += within if isinstance(value, dict | list | tuple | set) else vars(value).values()
        return found

    ours, theirs = reachable(one), reachable(other)
    return [ours[key] for key in ours.keys() & theirs.keys() if not isinstance(ours[key], tuple | torch.Size)]


def test_shared_objects_are_seen_wherever_they_are():
    def linear(**attributes):
        layer = nn.Linear(2, 2)
        vars(layer).update(attributes)
        return nn.Sequential(layer)

    settings, tensor, plain = {"kind": "a"}, torch.zeros(6), linear()
    assert shared(linear(a=settings), linear(b=[settings])) == [settings]
    assert shared(linear(a=(settings,)), linear(b=[(settings,)])) == [settings]
    assert len(shared(linear(a=tensor[:2]), linear(b={"view": tensor[2:]}))) == 1
    assert plain[0] in shared(plain, linear(parent=plain))
    assert not shared(linear(a=(1, 2)), linear(a=(1, 2)))


@pytest.mark.parametrize("wrap", [lambda parent: [parent], lambda parent: parent], ids=["in a list", "as it is"])
def test_attributes_of_a_replaced_layer_are_copied_with_the_model(wrap):
    """A way back to the parent must lead to the copy: else the dense model is kept alive, and pickled too."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    vars(model[0]).update(parent=wrap(model), settings={"scale": [1.0]})
    small = decomp.tucker(model, ranks=4)
    assert vars(small[0])["settings"] == {"scale": [1.0]}
    assert not shared(model, small)
    held = vars(small[0])["parent"]
    assert (held[0] if isinstance(held, list) else held) is small
    assert [name for name, _ in small[0].named_children()] == ["reduce", "expand"]
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


class Owner(nn.Module):
    """A module that knows a layer without being its parent."""

    def __init__(self, layer):
        super().__init__()
        object.__setattr__(self, "layer", layer)


def plain():
    return nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)


WAYS_BACK = {
    "a neighbour": lambda model: model[1],
    "a neighbour that is replaced": lambda model: model[2],
    "itself": lambda model: model[0],
    "a module around it": lambda model: nn.Sequential(model[0]),
    "a module that knows it": lambda model: Owner(model[0]),
    "its method": lambda model: model[0].forward,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", WAYS_BACK)
def test_an_unregistered_module_on_a_layer_leads_to_the_new_layers(way, inplace):
    model = nn.Sequential(*plain())
    object.__setattr__(model[0], "way", WAYS_BACK[way](model))
    dense = [weakref.ref(model[0]), weakref.ref(model[2])]
    small = decomp.svd(model, ranks=4, inplace=inplace)
    assert list(small.state_dict()) == list(decomp.svd(nn.Sequential(*plain()), ranks=4).state_dict())
    if way == "a neighbour":
        assert vars(small[0])["way"] is small[1]
    elif way == "a neighbour that is replaced":
        assert vars(small[0])["way"] is small[2]
    del model
    gc.collect()
    assert [layer() for layer in dense] == [None, None]
    assert len(pickle.dumps(small)) < 4 * (64 * 64), "no dense weight is in the file"


def test_a_layer_with_its_weight_under_another_name_stays_dense_with_the_reason():
    model = nn.Sequential(*plain())
    object.__setattr__(model[0], "kernel", model[0].weight)
    small = decomp.svd(model, ranks=4)
    assert "its attribute 'kernel' is its weight again" in small.decomp_plan["0"].reason
    assert small.decomp_plan["2"].ranks == (4,)


def test_a_way_back_to_the_parent_does_not_put_the_dense_model_into_the_file():
    def size_of_file(keep_parent):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        if keep_parent:
            vars(model[0])["parent"] = model
        small = decomp.tucker(model, ranks=4)
        assert pickle.loads(pickle.dumps(small))[0].ranks == (4,)
        return len(pickle.dumps(small))

    assert size_of_file(keep_parent=True) <= size_of_file(keep_parent=False) + 100


def test_planning_does_not_copy_the_model_for_every_layer_that_leads_to_it():
    class Counted(nn.Module):
        copies = 0

        def __deepcopy__(self, memo):
            Counted.copies += 1
            return Counted()

    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), Counted())
    vars(model[0])["parent"] = model
    decomp.plan(model, ranks=4)
    assert Counted.copies == 0
    x = torch.randn(4, 32)
    folded = decomp.fold_batch_norm(model[:2].eval(), x)
    assert vars(folded[0])["parent"][0] is folded[0]
    assert Counted.copies == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_a_way_back_to_the_parent_goes_there_and_back_again(inplace):
    """A reference to the layer itself leads to the layer that stands for it, and densify keeps all of them."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    vars(model[0]).update(parent=model, myself=model[0], options=[1, 2])
    for change in (
        lambda m: decomp.tucker(m, ranks=4, inplace=inplace),
        lambda m: decomp.densify(m, inplace=inplace),
    ):
        model = change(model)
        assert (vars(model[0])["parent"], vars(model[0])["myself"]) == (model, model[0])
        assert model[0].options == [1, 2]


def test_inplace_changes_the_model_itself():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Linear(32, 32))
    small = decomp.tucker(model, ranks=8, inplace=True)
    assert small is model
    assert isinstance(model[0], TuckerConv)
    with pytest.raises(ValueError, match="itself the layer"):
        decomp.tucker(nn.Linear(32, 32), ranks=4, inplace=True)


def test_inplace_computes_every_factor_before_the_first_swap(monkeypatch):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    original, calls = SVDLinear.from_factors.__func__, []

    def failing(cls, dense, factors):
        calls.append(dense)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return original(cls, dense, factors)

    monkeypatch.setattr(SVDLinear, "from_factors", classmethod(failing))
    with pytest.raises(RuntimeError, match="killed"):
        decomp.tucker(model, ranks=4, inplace=True)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_under_two_names_is_swapped_under_both(inplace):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.blocks = nn.ModuleDict({"again": nn.ModuleList([self.first])})

        def forward(self, x):
            return self.blocks["again"][0](self.first(x))

    model = Twice()
    plan = decomp.plan(model, ranks=4, example_inputs=torch.zeros(2, 32))
    assert list(plan) == ["first"]
    assert plan["first"].macs.before == 2 * 2 * 32 * 32
    small = plan.apply(model, inplace=inplace)
    assert isinstance(small.first, SVDLinear)
    assert small.blocks["again"][0] is small.first


def test_tied_weights_stay_tied_and_dense():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 32)
            self.body = nn.Linear(32, 32)
            self.head = nn.Linear(32, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.body(self.embedding(x)))

    small = decomp.tucker(Tied(), ranks=4)
    assert "tied: embedding.weight, head.weight" in small.decomp_plan["head"].reason
    assert small.head.weight is small.embedding.weight
    assert factorized(small) == ["body"]


def test_the_root_itself_and_direct_children_are_layers():
    assert isinstance(decomp.tucker(nn.Linear(32, 32), ranks=4), SVDLinear)
    assert isinstance(decomp.tucker(nn.Sequential(nn.Linear(32, 32)), ranks=4)[0], SVDLinear)


def refused():
    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda *_: None)
    tensor_hooked = nn.Linear(16, 16)
    tensor_hooked.weight.register_hook(lambda grad: grad)
    state_hooked = nn.Linear(16, 16)
    state_hooked.register_state_dict_post_hook(lambda *_: None)
    plain = nn.Linear(16, 16)
    del plain.weight
    plain.weight = torch.zeros(16, 16)
    replaced = nn.Linear(16, 16)
    replaced.forward = lambda x: x
    masked = nn.Linear(16, 16)
    prune.l1_unstructured(masked, "weight", 0.5)
    burdened = nn.Linear(16, 16)
    burdened.register_buffer("scale", torch.ones(1))
    with torch.device("meta"):
        unreal = nn.Linear(16, 16)
    empty = nn.Linear(16, 16)
    empty.weight = nn.Parameter(torch.zeros(0, 16))

    burdened_attention = nn.MultiheadAttention(16, 2)
    burdened_attention.register_buffer("scale", torch.ones(1))

    class Own(nn.Linear):
        pass

    yield hooked, "has hooks"
    yield tensor_hooked, "has hooks"
    yield state_hooked, "has hooks"
    yield plain, "no parameter"
    yield nn.Linear(16, 16, dtype=torch.float32).to(torch.float8_e4m3fn), "float8"
    yield replaced, "forward was replaced"
    yield masked, r"prune\.remove"
    yield burdened, "more than a weight and a bias: scale"
    yield unreal, "meta device"
    yield empty, "its weight is empty"
    yield Own(16, 16), "Own, a subclass of Linear"
    yield parametrizations.weight_norm(nn.Linear(16, 16)), "remove_parametrizations first"
    yield parametrizations.spectral_norm(nn.Conv2d(16, 16, 3)), "remove_parametrizations first"
    yield nn.LazyLinear(16), "not initialized yet"
    yield nn.LSTMCell(16, 16), "one fused kernel that reads both weights"
    yield nn.GRUCell(16, 16), "one fused kernel that reads both weights"
    yield burdened_attention, "holds more than the weights that are unpacked: scale"
    yield nn.Bilinear(16, 16, 16), "three-way"
    yield nn.Conv2d(16, 16, 3, groups=16), "depthwise"
    yield nn.Linear(16, 16, dtype=torch.complex64), "complex64"


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("layer", "words"), list(refused()), ids=lambda value: type(value).__name__)
def test_layers_that_must_not_be_swapped_stay_with_a_reason(layer, words):
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(32, 32)})
    plan = decomp.plan(model, ranks=4)
    assert plan["odd"].ranks == ()
    assert re.search(words, plan["odd"].reason)
    assert factorized(plan.apply(model, inplace=True)) == ["plain"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_old_style_norms_are_named():
    weight_normed = torch.nn.utils.weight_norm(nn.Linear(16, 16))
    spectral = torch.nn.utils.spectral_norm(nn.Linear(16, 16))
    assert "remove_weight_norm" in decomp.plan(nn.ModuleList([weight_normed]), ranks=4)["0"].reason
    assert "remove_spectral_norm" in decomp.plan(nn.ModuleList([spectral]), ranks=4)["0"].reason


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_wrapped_models_are_refused_with_the_way_out():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(TypeError, match=r"torch\.compile was called with"):
        decomp.tucker(torch.compile(model), ranks=4)
    with pytest.raises(TypeError, match=r"give model\.module"):
        decomp.tucker(nn.DataParallel(model), ranks=4)
    with pytest.raises(TypeError, match=r"model\.1 is wrapped"):
        decomp.plan(nn.Sequential(nn.ReLU(), torch.compile(model)), ranks=4)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module is needed, not OrderedDict"):
        decomp.tucker(model.state_dict(), ranks=4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(TypeError, match="TorchScript"):
        decomp.tucker(scripted, ranks=4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", ["layers.*.linear*", "layers.1.linear1"])
def test_transformer_encoder_runs_factorized_in_every_mode(masked, layers):
    """Its fused path would multiply by the dense weights, or crash; dense layers must work beside it."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = plant_spectra(nn.TransformerEncoder(layer, 2))
    small = decomp.tucker(model, ranks=8, layers=layers)
    oracle = copy.deepcopy(model)
    for name in factorized(small):
        oracle.get_submodule(name).weight.data = small.get_submodule(name).dense_weight().data
    x = torch.randn(3, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]) if masked else None
    counted = []
    small.layers[1].linear1.reduce.register_forward_hook(lambda *_: counted.append(1))
    expected = oracle.train()(x, src_key_padding_mask=mask).detach()
    keep = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
    for mode in ("train", "eval", "no_grad", "inference_mode"):
        small.train(mode == "train")
        guard = getattr(torch, mode)() if hasattr(torch, mode) and mode != "train" else torch.enable_grad()
        with guard:
            got = small(x, src_key_padding_mask=mask)
        torch.testing.assert_close(got[keep], expected[keep], rtol=1e-4, atol=1e-5)
    assert len(counted) == 4, "the factors must run in every mode"


def test_hugging_face_bert_is_compressed_and_keeps_its_shape():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config).eval()
    batch = {"input_ids": torch.randint(0, 60, (2, 7))}
    small = decomp.tucker(model, ranks=8, example_inputs=batch)
    assert len(factorized(small)) == 2 * 6 + 1
    with torch.no_grad():
        assert small(**batch).last_hidden_state.shape == (2, 7, 32)
    assert small.decomp_plan.macs.after == decomp.profile(small, batch).total.macs


def test_bf16_models_are_factored_in_float64_and_stay_bf16():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1)).to(torch.bfloat16)
    small = decomp.tucker(model, ranks=8)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small(torch.randn(1, 16, 8, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_selection_by_glob_type_and_predicate():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Conv2d(32, 32, 3)})

    def swapped(**arguments):
        return factorized(decomp.tucker(model, ranks=4, **arguments))

    assert swapped(layers="[ab]") == ["a", "b"]
    assert swapped(layers=nn.Conv2d) == ["c"]
    assert swapped(layers=["a", nn.Conv2d]) == ["a", "c"]
    assert swapped(layers=lambda name, module: name == "b") == ["b"]
    assert swapped(exclude="a") == ["b", "c"]
    assert swapped(layers=nn.Linear, exclude=("b",)) == ["a"]
    plan = decomp.plan(model, ranks=4, layers="a")
    assert (plan["a"].reason, plan["b"].reason) == ("", "not among layers=")
    with pytest.raises(ValueError, match=r"layers='x\*' matches no layer; layers are 'a', 'b', 'c'"):
        swapped(layers="x*")
    with pytest.raises(ValueError, match="exclude='fc' matches no layer"):
        swapped(exclude="fc")
    with pytest.raises(TypeError, match="layers=3: write a glob"):
        swapped(layers=3)


def test_a_layer_that_the_example_never_reaches_stays_dense():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    plan = decomp.plan(Aside(), ranks=4, example_inputs=torch.zeros(1, 32))
    assert plan["unused"].reason == "not called on example_inputs"


def test_example_inputs_do_not_move_batch_norm_or_flags():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)).train()
    before = copy.deepcopy(model.state_dict())
    decomp.plan(model, ranks=4, example_inputs=torch.randn(2, 16, 8, 8))
    decomp.profile(model, torch.randn(2, 16, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert model[1].training


def test_a_model_without_any_layer_says_so():
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        decomp.tucker(nn.Sequential(nn.ReLU()))


def test_a_model_that_cannot_be_copied_names_inplace():
    model = nn.Sequential(nn.Linear(32, 32))
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="inplace=True"):
        decomp.tucker(model, ranks=4)
    assert isinstance(decomp.tucker(model, ranks=4, inplace=True)[0], SVDLinear)


def test_a_layer_whose_weight_the_model_reads_stays_dense():
    """T5 asks for wo.weight.dtype, others hand the weight to a function: that would multiply the factors."""

    class Reads(nn.Module):
        def __init__(self, used):
            super().__init__()
            self.read, self.called, self.used = nn.Linear(32, 32), nn.Linear(32, 32), used

        def forward(self, x):
            if self.used:
                return self.called(nn.functional.linear(x, self.read.weight, self.read.bias)) + self.read(x)
            return self.called(self.read(x.to(self.read.weight.dtype)))

    for used in (True, False):
        model = Reads(used)
        plan = decomp.plan(model, ranks=4, example_inputs=torch.zeros(2, 32))
        assert "reads its weight" in plan["read"].reason
        small = plan.apply(model)
        assert decomp.profile(small, torch.zeros(2, 32)).total.macs == plan.macs.after < plan.macs.before
    x = torch.randn(2, 32)
    blind = decomp.tucker(model, ranks=4)  # without example_inputs: slower, still right
    oracle = copy.deepcopy(model)
    for name in ("read", "called"):
        oracle.get_submodule(name).weight.data = blind.get_submodule(name).dense_weight().data
    torch.testing.assert_close(blind(x), oracle(x))


def test_transposed_convolutions_take_an_output_size():
    class Up(nn.Module):
        def __init__(self, kernel):
            super().__init__()
            self.up, self.more = nn.ConvTranspose2d(16, 16, kernel, stride=2), kernel - 1

        def forward(self, x):
            return self.up(x, output_size=(2 * x.shape[2] + self.more, 2 * x.shape[3] + self.more))

    for kernel in (1, 3):
        model, x = Up(kernel), torch.randn(1, 16, 5, 5)
        plan = decomp.plan(model, ranks=4, example_inputs=x)
        small = plan.apply(model)
        oracle = copy.deepcopy(model)
        oracle.up.weight.data = small.up.dense_weight().data
        torch.testing.assert_close(small(x), oracle(x))
        assert decomp.profile(small, x).total.macs == plan.macs.after


def test_a_layer_that_is_reached_with_nothing_stays_dense():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            self.two(x[:0])
            return self.one(x)

    assert "empty batch" in decomp.plan(Empty(), ranks=4, example_inputs=torch.zeros(2, 32))["two"].reason


def test_named_tuples_and_packed_sequences_arrive_as_they_are():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 32)

        def forward(self, packed):
            return self.head(self.rnn(packed)[0].data)

    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 5, 8), [5, 3, 2], batch_first=True)
    plan = decomp.plan(Recurrent(), ranks=4, example_inputs=packed)
    assert plan["head"].macs.before == 10 * 16 * 32


def test_layers_of_other_kinds_are_listed_with_a_reason():
    from transformers import GPT2Config, GPT2Model

    plan = decomp.plan(
        GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)), ranks=4
    )
    assert plan["h.0.attn.c_attn"].method == "svd"
    assert plan["wte"].reason.startswith("an embedding is decomposed only when asked for")


def test_a_model_that_changes_its_weights_in_eval_is_left_alone():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def train(self, mode=True):
            if not mode:
                self.layer.weight.data.add_(1)
            return super().train(mode)

        def forward(self, x):
            return self.layer(x)

    model = Merging()
    before = model.layer.weight.clone()
    decomp.plan(model, ranks=4, example_inputs=torch.zeros(1, 32))
    decomp.profile(model, torch.zeros(1, 32))
    assert torch.equal(model.layer.weight, before)


def test_what_was_set_on_a_layer_stays_on_it():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].tag = "first"
    assert decomp.tucker(model, ranks=4)[0].tag == "first"


def test_inplace_is_refused_where_a_plain_list_holds_the_layer():
    model = nn.Sequential(nn.Linear(32, 32))
    model.order = [model[0]]
    with pytest.raises(ValueError, match="order holds a layer that would be replaced"):
        decomp.tucker(model, ranks=4, inplace=True)
    small = decomp.tucker(model, ranks=4)
    assert small.order[0] is small[0]


def test_hooks_and_flags_survive_a_forward_that_raises():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            self.layer(x)
            raise RuntimeError("no")

    model = Raises()
    for run in (decomp.profile, lambda m, x: decomp.plan(m, ranks=4, example_inputs=x)):
        with pytest.raises(RuntimeError, match="no"):
            run(model, torch.zeros(1, 32))
    assert model.training
    assert model.layer.training
    assert not model.layer._forward_hooks
    assert not model.layer._forward_pre_hooks


def made(model):
    """Models by every way of making them, from one convolution, its BatchNorm and a linear layer."""
    x = torch.randn(8, 6, 5, 5)
    ranks = {"0": (3, 2), "4": 3}
    for call in (decomp.tucker, decomp.svd):
        yield call(model, ranks=2)
    yield decomp.cp(model, ranks=3)
    yield decomp.block_term(model, ranks=1, blocks=2)
    yield decomp.compress(model, x, macs=0.6)
    yield decomp.tucker(model, ranks=ranks, data=[x, x])
    yield decomp.tucker(model, ranks=ranks, data=[x, x], sequential=True)
    yield decomp.tucker(nn.Sequential(model[0]), ranks=2, inplace=True)
    plan = decomp.plan(model, "monochromatic", ranks=2, layers="0")
    yield plan.apply(model)
    yield plan.build(model)
    yield decomp.densify(plan.apply(model))
    yield decomp.fold_batch_norm(model, x)


def test_models_made_in_inference_mode_can_be_trained_and_repaired_afterwards():
    """Their parameters would be inference tensors, which autograd takes nowhere."""

    def dense():
        layers = [nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16)]
        return nn.Sequential(*layers).eval()

    with torch.inference_mode():
        models = [*made(dense())]
    model, x = dense(), torch.randn(8, 6, 5, 5)
    with torch.inference_mode():
        models += [*made(model)]
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    with torch.no_grad():
        models += [*made(model)]
        assert not torch.is_grad_enabled()
    for small in models:
        assert not any(tensor.is_inference() for tensor in (*small.parameters(), *small.buffers()))
        small.train()(x).sum().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())
    small = next(made(model))
    decomp.repair(small, model, [x, x, x, x], progress=False)
    decomp.finetune_layerwise(small, model, [x, x], steps=1, progress=False)
