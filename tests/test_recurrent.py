"""LSTM, GRU and RNN layers with low-rank weights, against torch's own layers with the products of the factors."""

import copy
import json
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import decomp
from decomp.layers import SVDRNN, InputSVDRNN
from decomp.layers.kernels import recurrent_matrices, weight_of
from decomp.layers.recurrent import LowRankRecurrence
from decomp.methods import METHODS
from decomp.network.flops import Call
from decomp.planning.cost import Price, count_macs, count_params

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
ROWS = ("svd_rnn_input", "svd_rnn")
KINDS = {
    "LSTM": lambda *sizes, **options: nn.LSTM(*sizes, **options),
    "GRU": lambda *sizes, **options: nn.GRU(*sizes, **options),
    "tanh": lambda *sizes, **options: nn.RNN(*sizes, **options),
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "LSTM with projection": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=4, **options),
}
INPUTS, HIDDEN, BATCH, STEPS = 7, 6, 4, 5


def grid(kind, dtype=torch.float64):
    """Every option of a kind of layer."""
    for layers, bias, batch_first, both in product((1, 2, 3), *[(True, False)] * 3):
        options = {"bias": bias, "batch_first": batch_first, "bidirectional": both}
        yield KINDS[kind](INPUTS, HIDDEN, layers, dtype=dtype, **options)


def factorized(name, dense, ranks):
    method = METHODS[name]
    return method.layer_of(dense).from_factors(dense, method.factors(method.kernels(dense), ranks))


def limits_of(name, dense):
    return METHODS[name].limits(METHODS[name].kernels(dense))


def small_ranks(name, dense):
    return tuple(max(1, limit - 3 - place) for place, limit in enumerate(limits_of(name, dense)))


def states_of(dense, batch):
    """Initial states, for a batch or for one sequence without a batch axis (None)."""
    count = dense.num_layers * (2 if dense.bidirectional else 1)
    dtype = next(dense.parameters()).dtype
    sizes = [dense.proj_size or HIDDEN, *([HIDDEN] if dense.mode == "LSTM" else [])]
    states = tuple(torch.randn(count, *(() if batch is None else (batch,)), size, dtype=dtype) for size in sizes)
    return states if dense.mode == "LSTM" else states[0]


def calls(dense):
    """Batches, single sequences, packed sequences sorted and not, with and without initial states."""
    dtype = next(dense.parameters()).dtype
    x = torch.randn(BATCH, STEPS, INPUTS, dtype=dtype)
    for enforced, lengths in ((False, [2, 5, 1, 4]), (True, [5, 3, 3, 1])):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforced)
        yield packed, None
        yield packed, states_of(dense, BATCH)
    yield x[0], None
    yield x[0], states_of(dense, None)
    yield x[:, :1], None
    x = x if dense.batch_first else x.transpose(0, 1)
    yield x, None
    yield x, states_of(dense, BATCH)


def assert_same(given, expected, atol=1e-12):
    """Outputs and last states, with their shapes and the order of packed sequences."""
    (ours, our_states), (theirs, their_states) = given, expected
    assert type(ours) is type(theirs)
    if isinstance(theirs, PackedSequence):
        assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
        pairs = [(ours.sorted_indices, theirs.sorted_indices), (ours.unsorted_indices, theirs.unsorted_indices)]
        assert all(a is b or torch.equal(a, b) for a, b in pairs)
        ours, theirs = ours.data, theirs.data
    assert type(our_states) is type(their_states)
    both = [(ours, theirs)]
    both += (
        zip(our_states, their_states, strict=True) if isinstance(theirs, tuple) else [(our_states, their_states)]
    )
    for a, b in both:
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def brute_force(name, dense, ranks):
    """The dense layer with truncated weights, written without the code under test."""
    oracle = copy.deepcopy(dense)
    names = ("input", "upper") if name == "svd_rnn_input" else ("input", "recurrent", "upper")
    rank_of = dict(zip(names, ranks, strict=False))
    for layer in range(dense.num_layers):
        suffixes = ("", "_reverse") if dense.bidirectional else ("",)
        weights = [oracle.get_parameter(f"weight_ih_l{layer}{suffix}").data for suffix in suffixes]
        cut = truncated(torch.cat(weights), rank_of["upper" if layer else "input"])
        for weight, part in zip(weights, cut.chunk(len(weights)), strict=True):
            weight.copy_(part)
        for suffix in suffixes if "recurrent" in rank_of else ():
            weight = oracle.get_parameter(f"weight_hh_l{layer}{suffix}").data
            weight.copy_(truncated(weight, rank_of["recurrent"]))
    return oracle


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_full_ranks_give_the_layer_back(name, kind):
    for dense in grid(kind):
        small = factorized(name, dense, limits_of(name, dense))
        assert not any(isinstance(child, nn.Linear | LowRankRecurrence) for child in small.children())
        for x, states in calls(dense):
            assert_same(small(x, states), dense(x, states))
        pairs = zip(small.to_dense().named_parameters(), dense.named_parameters(), strict=True)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_lower_ranks_run_as_the_dense_layer_with_truncated_weights(name, kind):
    count = 0
    for dense in grid(kind):
        ranks = small_ranks(name, dense)
        small, oracle = factorized(name, dense, ranks), brute_force(name, dense, ranks)
        assert small.ranks == ranks
        for x, states in calls(dense):
            assert_same(small(x, states), oracle(x, states))
            count += 1
        assert repr(small.to_dense()) == repr(dense)
        assert_same(small.to_dense()(x), oracle(x))
    assert count == 9 * 24


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_draws_as_in_the_dense_layer(name, kind):
    dense = KINDS[kind](INPUTS, HIDDEN, 3, dropout=0.4, dtype=torch.float64)
    small = factorized(name, dense, small_ranks(name, dense))
    oracle = small.to_dense()
    assert oracle.dropout == 0.4
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for given in (x, pack_padded_sequence(x, [5, 4, 2, 1])):
        torch.manual_seed(3)
        ours = small.train()(given)
        torch.manual_seed(3)
        assert_same(ours, oracle.train()(given))
        assert_same(small.eval()(given), oracle.eval()(given))
        rows, quiet = (
            each[0].data if isinstance(given, PackedSequence) else each[0] for each in (ours, small(given))
        )
        assert not torch.equal(rows, quiet), "nothing was dropped"


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_errors_of_the_analysis_are_those_of_the_layer(name, kind):
    for layers, both in product((1, 2, 3), (True, False)):
        dense = KINDS[kind](INPUTS, HIDDEN, layers, bidirectional=both, dtype=torch.float64)
        method, limits = METHODS[name], limits_of(name, dense)
        analysis = method.analyse(method.kernels(dense))
        energy = sum(
            p.detach().square().sum()
            for n, p in dense.named_parameters()
            if n.startswith(("weight_i", "weight_hh"))
        )
        assert analysis.energy == pytest.approx(float(energy), rel=1e-12)
        assert len(analysis.ranks) == torch.tensor(limits).prod()
        squared = analysis.squared_errors()
        for place in range(0, len(analysis.ranks), max(1, len(analysis.ranks) // 12)):
            ranks = tuple(analysis.ranks[place].tolist())
            small = factorized(name, dense, ranks)
            lost = float((small.dense_weight() - weight_of(dense)).detach().square().sum())
            for error in (analysis.squared_error(ranks), squared[place]):
                assert error == pytest.approx(lost, abs=1e-12 * analysis.energy)
            brute = weight_of(brute_force(name, dense, ranks))
            torch.testing.assert_close(small.dense_weight(), brute, rtol=0, atol=1e-12)


def test_the_grid_of_a_large_layer_is_thinned_and_its_errors_are_exact():
    dense = nn.LSTM(200, 256, 2)
    method = METHODS["svd_rnn"]
    kernels = method.kernels(dense)
    analysis = method.analyse(kernels)
    assert method.limits(kernels) == (200, 256, 256)
    modes = [sorted(set(column.tolist())) for column in analysis.ranks.T]
    assert len(analysis.ranks) == len(modes[0]) * len(modes[1]) * len(modes[2]) < 2**20
    assert all(mode[0] == 1 and mode[-1] == limit for mode, limit in zip(modes, (200, 256, 256), strict=True))
    place = len(analysis.ranks) // 3
    ranks = tuple(analysis.ranks[place].tolist())
    assert analysis.squared_errors()[place] == pytest.approx(analysis.squared_error(ranks), rel=1e-12)
    assert analysis.squared_error((200, 255, 256)) > 0


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_prices_are_those_of_built_layers(name, kind):
    for layers, both in ((1, False), (2, True), (3, False)):
        dense = KINDS[kind](INPUTS, HIDDEN, layers, bidirectional=both)
        limits = limits_of(name, dense)
        for call in (Call((3, 5, INPUTS)), Call((5, INPUTS)), Call((9, INPUTS), None, (4, 3, 2))):
            price = Price(dense, METHODS[name].layer_of(dense), limits, [call])
            for ranks in (limits, small_ranks(name, dense), (1,) * len(limits), (*limits[:-1], 1)):
                built = METHODS[name].layer_of(dense).like(price.spec, ranks)
                params = count_params(built)
                rows = 9 if call.batch_sizes else torch.tensor(call.shape[:-1]).prod().item()
                weights = sum(p.numel() for n, p in built.named_parameters() if "bias" not in n)
                assert price(ranks) == {"params": params, "macs": rows * weights, "bytes": 4 * params}, ranks
                assert count_macs(built, [call]) == rows * weights


def test_macs_of_one_step_are_those_of_the_loop():
    """The price is counted on one step of as many rows; here the loop itself is counted."""
    small = SVDRNN.like(nn.LSTM(7, 6, 2, bidirectional=True), (2, 3, 4)).eval()
    for x in (torch.randn(5, 3, 7), pack_padded_sequence(torch.randn(5, 3, 7), [5, 4, 2])):
        rows = x.data.numel() // 7
        weights = sum(p.numel() for n, p in small.named_parameters() if "bias" not in n)
        total = decomp.profile(nn.Sequential(small), x if isinstance(x, torch.Tensor) else (x,)).total
        assert total.macs == rows * weights


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_input_states_and_every_factor(name, kind):
    dense = KINDS[kind](3, 4 if "proj" not in kind else 5, 2, bidirectional=True, dtype=torch.float64)
    limits = limits_of(name, dense)
    small = METHODS[name].layer_of(dense).like(dense, tuple(min(2, limit) for limit in limits))
    parameters = dict(small.named_parameters())
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        packed = pack_padded_sequence(x, [3, 2])
        given = dict(zip(parameters, values, strict=True))
        output, states = torch.func.functional_call(small, given, (packed,))
        return output.data, *(states if isinstance(states, tuple) else (states,))

    if "relu" in kind:  # not differentiable at 0, where no pre-activation lies
        assert torch.autograd.gradcheck(run, (x, *parameters.values()), eps=1e-8, atol=1e-4)
    else:
        assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_flags_and_frozen_parameters_are_kept(name, kind, dtype):
    dense = KINDS[kind](INPUTS, HIDDEN, 2, bidirectional=True, dtype=dtype).eval()
    dense.weight_hh_l1.requires_grad_(False)
    for part in (name for name, _ in dense.named_parameters() if name.startswith("weight_ih_l0")):
        dense.get_parameter(part).requires_grad_(False)
    small = factorized(name, dense, small_ranks(name, dense))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert not any(module.training for module in small.modules())
    frozen = {n for n, p in small.named_parameters() if not p.requires_grad}
    own = (
        {"layer_l1.weight_hh_l0"}
        if name == "svd_rnn_input"
        else {"layer_l1.expand_hh_l0", "layer_l1.reduce_hh_l0"}
    )
    assert frozen == {"reduce_l0.weight", "layer_l0.weight_ih_l0", "layer_l0.weight_ih_l0_reverse", *own}
    again = small.to_dense()
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {
        n for n, p in dense.named_parameters() if not p.requires_grad
    }
    memory = {p.untyped_storage().data_ptr() for p in dense.parameters()}
    assert not any(p.untyped_storage().data_ptr() in memory for p in (*small.parameters(), *again.parameters()))
    torch.testing.assert_close(again.bias_hh_l1, dense.bias_hh_l1)
    assert not again.training
    assert torch.isfinite(small(torch.randn(2, 3, INPUTS, dtype=dtype))[0]).all()


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export says so of every nn.LSTM
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_copy_pickle_and_export(name, kind):
    dense = KINDS[kind](INPUTS, HIDDEN, 2, batch_first=True, bidirectional=True)
    small = factorized(name, dense, small_ranks(name, dense)).eval()
    fresh = type(small).like(dense, small.ranks)
    fresh.load_state_dict(small.state_dict())
    x = torch.randn(3, STEPS, INPUTS)
    for again in (fresh, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert_same(again(x), small(x), atol=0)
        assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in small.parameters()}
    exported = torch.export.export(small, (x,)).module()
    assert_same(exported(x), small(x), atol=1e-6)
    double = copy.deepcopy(small).double()
    assert_same(double(x.double()), double.to_dense()(x.double()))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ROWS)
def test_torchscript_is_made_by_tracing_and_refused_by_script(name):
    small = (
        METHODS[name]
        .layer_of(nn.LSTM(7, 6))
        .like(nn.LSTM(7, 6), (2, 3)[: len(METHODS[name].rank_names) - 1])
        .eval()
    )
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert_same(torch.jit.trace(small, (x,))(x), small(x), atol=1e-6)
    with pytest.raises(TypeError, match=r"torch\.jit\.script does not take"):
        torch.jit.script(small)


@pytest.mark.parametrize("name", ROWS)
def test_attributes_and_dense_parameters_can_be_read_and_not_set(name):
    dense = nn.LSTM(INPUTS, HIDDEN, 2, dropout=0.1, bidirectional=True, proj_size=3, batch_first=True)
    dense.tag, dense.parent = "mine", [nn.ReLU()]
    model = nn.ModuleDict({"rnn": dense})
    small = decomp.plan(model, name, ranks=2).apply(model)["rnn"]
    for attribute in (
        *(
            "input_size",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
            "proj_size",
        ),
        *("mode", "tag"),
    ):
        assert getattr(small, attribute) == getattr(dense, attribute)
    assert small.to_dense().tag == "mine"
    assert isinstance(small.parent[0], nn.ReLU)
    assert small.parent[0] is not dense.parent[0]
    assert not {"_flat_weights", "_flat_weight_refs"} & set(vars(small))
    oracle = small.to_dense()
    for parameter, _ in dense.named_parameters():
        torch.testing.assert_close(getattr(small, parameter), getattr(oracle, parameter))
    shapes = [[tuple(each.shape) for each in weights] for weights in dense.all_weights]
    assert [[tuple(each.shape) for each in weights] for weights in small.all_weights] == shapes
    torch.testing.assert_close(small.weight, weight_of(oracle))
    small.flatten_parameters()
    with pytest.raises(AttributeError, match="weight_ih_l2"):
        small.weight_ih_l2  # noqa: B018
    for call in (
        lambda: setattr(small, "weight_hh_l0", nn.Parameter(torch.zeros(2, 2))),
        lambda: setattr(small, "bias", False),
        lambda: setattr(small, "weight", torch.zeros(2)),
        lambda: prune.l1_unstructured(small, "weight_ih_l0", 0.5),
    ):
        with pytest.raises(AttributeError, match=r"cannot be set or pruned.*layer\.layer_l0\.weight_ih_l0"):
            call()
    small.reset_parameters()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7.0)
    small.reset_parameters()
    assert not any((parameter == 7.0).any() for parameter in small.parameters())


@pytest.mark.parametrize("name", ROWS)
def test_states_of_a_wrong_shape_are_an_error(name):
    small = (
        METHODS[name]
        .layer_of(nn.GRU(7, 6))
        .like(nn.GRU(7, 6, 2), (3,) * (len(ROWS[0:1]) + len(METHODS[name].rank_names) - 1))
    )
    with pytest.raises(RuntimeError, match="states of 2 layers and directions are needed, not 1"):
        small(torch.randn(5, 4, 7), torch.zeros(1, 4, 6))
    with pytest.raises(RuntimeError, match=r"hidden|hx"):
        small(torch.randn(5, 4, 7), torch.zeros(2, 3, 6))
    with pytest.raises(RuntimeError, match=r"hidden|hx"):
        small(torch.randn(5, 4, 7), torch.zeros(2, 4, 5))


@pytest.mark.parametrize("name", ROWS)
def test_autocast_runs_and_does_not_round_the_products(name):
    dense = nn.LSTM(INPUTS, HIDDEN, 2)
    small = factorized(name, dense, small_ranks(name, dense))
    x = torch.randn(STEPS, BATCH, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            reference = dense(x)[0]
        except RuntimeError as error:
            pytest.skip(f"torch itself has no LSTM in bfloat16 for this processor: {error}")
        output, weight = small(x)[0], small.weight
        again = small.to_dense()
    assert output.dtype == reference.dtype
    torch.testing.assert_close(output.float(), small(x)[0], rtol=0.1, atol=0.1)
    assert torch.equal(weight, small.dense_weight())
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_factors_that_do_not_fit_are_an_error():
    method = METHODS["svd_rnn_input"]
    factors = method.factors(method.kernels(nn.LSTM(8, 6)), (3,))
    with pytest.raises(ValueError, match=r"InputSVDRNN\.reduce_l0\.weight.*\(3, 8\).*\(3, 9\)"):
        InputSVDRNN.from_factors(nn.LSTM(9, 6), factors)


def test_matrices_are_the_weights_directions_one_below_the_other():
    dense = nn.GRU(5, 3, 2, bidirectional=True)
    matrices = recurrent_matrices(dense)
    assert torch.equal(matrices["input"][0], torch.cat([dense.weight_ih_l0, dense.weight_ih_l0_reverse]))
    assert torch.equal(matrices["upper"][0], torch.cat([dense.weight_ih_l1, dense.weight_ih_l1_reverse]))
    assert torch.equal(matrices["recurrent"][3], dense.weight_hh_l1_reverse)
    assert weight_of(dense).shape == (18, 5 + 6 + 2 * 3)


class Tagger(nn.Module):
    """Embedding, LSTM or GRU in both directions, one linear layer for the tags; words of index 0 are padding."""

    def __init__(self, kind=nn.LSTM, packed=True, words=60, width=24, hidden=24, tags=5):
        super().__init__()
        self.packed = packed
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.rnn = kind(width, hidden, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, tags)

    def forward(self, words):
        x = self.embed(words)
        if not self.packed:
            return self.head(self.rnn(x)[0])
        x = pack_padded_sequence(x, (words != 0).sum(1).cpu(), batch_first=True, enforce_sorted=False)
        output, _ = self.rnn(x)
        return self.head(pad_packed_sequence(output, batch_first=True, total_length=words.shape[1])[0])


def sentences(count, length=9, words=60):
    """Random words, and as tag of each the sum of its neighbours' and its own index, modulo 5."""
    batch = torch.randint(1, words, (count, length))
    for row, end in enumerate(torch.randint(4, length + 1, (count,)).tolist()):
        batch[row, end:] = 0
    padded = nn.functional.pad(batch, (1, 1))
    tags = ((padded[:, :-2] > 30).long() + (padded[:, 2:] > 30).long() + (batch > 30).long()).masked_fill(
        batch == 0, -100
    )
    return batch, tags


def trained(kind=nn.LSTM):
    model = Tagger(kind)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(120):
        words, tags = sentences(32)
        loss = nn.functional.cross_entropy(model(words).flatten(0, 1), tags.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    torch.manual_seed(7)
    words, tags = sentences(200)
    return float((model(words).argmax(-1) == tags)[tags >= 0].float().mean())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_tagger_is_compressed_and_fine_tuned_end_to_end(kind):
    model = trained(kind)
    assert accuracy(model) > 0.95
    words, _ = sentences(8)
    reports = {}
    for rule in ("vbmf", decomp.ranks.energy(0.8), 6, (8, 5)):
        small = decomp.tucker(model, ranks=rule, example_inputs=words)
        choice = small.decomp_plan["rnn"]
        assert choice.method == "svd_rnn_input"
        assert choice.params.after < choice.params.before
        assert choice.macs.after < choice.macs.before
        assert count_params(small) == small.decomp_plan.params.after
        assert decomp.profile(small, words).total.macs == small.decomp_plan.macs.after
        assert choice.error == pytest.approx(
            float(((small.rnn.weight - weight_of(model.rnn)).norm() / weight_of(model.rnn).norm()).detach()),
            rel=1e-4,
        )
        reports[rule] = accuracy(small)
    small = decomp.tucker(model, ranks=2, layers="rnn")
    before = accuracy(small)
    data = [sentences(32)[0] for _ in range(8)]
    report = decomp.finetune_layerwise(small, model, data, steps=150, progress=False)
    assert report["rnn"].error_after < 0.7 * report["rnn"].error_before
    labelled = [sentences(32) for _ in range(12)]

    def loss(network, batch):
        return nn.functional.cross_entropy(network(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    decomp.finetune(small, labelled, loss=loss, steps=60, progress=False)
    assert accuracy(small) > max(before, 0.93)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_budgets_hold_and_recurrent_weights_are_for_those_who_ask(kind):
    model, (words, _) = Tagger(kind), sentences(4)
    small = decomp.compress(model, words, macs=0.6)
    assert small.decomp_plan["rnn"].method == "svd_rnn_input"
    assert decomp.profile(small, words).total.macs <= 0.6 * decomp.profile(model, words).total.macs
    small = decomp.compress(model, params=0.6)
    assert count_params(small) <= 0.6 * count_params(model)
    with pytest.raises(ValueError, match=r"params=0\.3 cannot be reached.*; 'svd_rnn' in methods= decomposes"):
        decomp.compress(model, params=0.3)
    small = decomp.compress(model, params=0.3, methods=["svd", "svd_rnn"])
    assert small.decomp_plan["rnn"].method == "svd_rnn"
    assert count_params(small) <= 0.3 * count_params(model)
    assert small(words).shape == (4, 9, 5)
    fixed = decomp.plan(model, macs=0.6, example_inputs=words, multiple_of=8)
    assert all(rank % 8 == 0 for rank in fixed["rnn"].ranks)
    assert decomp.plan(model, "kronecker", ranks=4)["rnn"].method == "svd_rnn_input"


def test_seconds_are_measured_on_the_packed_sequences(seconds_of_macs):
    model, (words, _) = Tagger(), sentences(4)
    plan = decomp.plan(model, example_inputs=words, seconds=10.0)
    macs = plan["rnn"].macs.before
    assert plan.candidates["rnn"][0].stopwatch.dense == pytest.approx(macs * seconds_of_macs, rel=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_plans_go_through_json_building_and_back_to_dense(name):
    model, (words, _) = Tagger(), sentences(4)
    plan = decomp.plan(model, name, ranks=decomp.ranks.energy(0.7), example_inputs=words)
    small = plan.apply(model)
    again = decomp.Plan.from_json(json.dumps(json.loads(small.decomp_plan.to_json())))
    assert again["rnn"] == small.decomp_plan["rnn"]
    assert again["rnn"].layer == "LSTM 24>24 x2 both ways"
    built = again.build(Tagger())
    built.load_state_dict(small.state_dict())
    assert torch.equal(built(words), small(words))
    torch.testing.assert_close(again.apply(model)(words), small(words))
    with torch.device("meta"):
        empty = again.build(Tagger())
    empty.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(empty(words), small(words))
    dense = decomp.densify(small)
    assert type(dense.rnn) is nn.LSTM
    torch.testing.assert_close(dense(words), small(words), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="'rnn' is LSTM 24>20 x2 both ways"):
        again.build(Tagger(hidden=20))
    assert decomp.plan(model, ranks=again)["rnn"].ranks == again["rnn"].ranks
    edited = plan.with_ranks("rnn", 3)
    assert edited["rnn"].ranks == (3,) * len(plan["rnn"].ranks)
    assert "svd_rnn" in str(plan)
    assert decomp.plan(small, ranks=4)["rnn"].reason == "already factorized"


def test_rules_bound_what_is_built():
    model = nn.ModuleDict({"rnn": nn.LSTM(24, 16, 2)})
    for rule, kind in ((decomp.ranks.params(0.8), "params"), (decomp.ranks.macs(0.7), "macs")):
        choice = decomp.plan(model, ranks=rule)["rnn"]
        change = choice.costs[kind]
        assert choice.ranks
        assert change.after <= rule.share * change.before
    choice = decomp.plan(model, "svd_rnn", ranks=decomp.ranks.error(0.4))["rnn"]
    assert 0 < choice.error <= 0.4
    assert decomp.plan(model, ranks=(16, 8, 4))["rnn"].ranks == (4, 4)
    assert decomp.plan(model, ranks=(9, 5))["rnn"].ranks == (9, 5)
    with pytest.raises(ValueError, match="exceeds its largest ranks"):
        decomp.plan(model, ranks={"rnn": (25, 4)})
    dense = decomp.plan(nn.ModuleDict({"rnn": nn.LSTM(16, 16)}), ranks=15)["rnn"]
    assert dense.reason.startswith("not cheaper at 15")


def refused():
    class Own(nn.LSTM):
        pass

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.odd = nn.LSTM(16, 16), nn.LSTM(16, 16)
            self.odd.weight_hh_l0 = self.one.weight_hh_l0

    hooked, normed, burdened, empty = (
        nn.LSTM(16, 16),
        nn.LSTM(16, 16),
        nn.GRU(16, 16),
        nn.LSTM(16, 16, device="meta"),
    )
    hooked.register_forward_hook(lambda *given: None)
    parametrizations.weight_norm(normed, "weight_hh_l0")
    burdened.register_buffer("scale", torch.ones(1))
    yield nn.ModuleDict({"odd": Own(16, 16)}), "Own, a subclass of LSTM"
    yield nn.ModuleDict({"odd": hooked}), "has hooks"
    yield nn.ModuleDict({"odd": normed}), "remove_parametrizations first"
    yield nn.ModuleDict({"odd": burdened}), "holds more than its weights and biases: scale"
    yield nn.ModuleDict({"odd": empty}), "meta device"
    yield nn.ModuleDict({"odd": nn.LSTM(16, 16).to(torch.float8_e4m3fn)}), "float8"
    yield nn.ModuleDict({"odd": nn.LSTMCell(16, 16)}), "one fused kernel that reads both weights"
    yield Shared(), "its weight is tied: one.weight_hh_l0, odd.weight_hh_l0 share it"


@pytest.mark.parametrize(
    ("model", "words"), list(refused()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_layers_that_must_not_be_swapped_stay_with_a_reason(model, words):
    choice = decomp.plan(model, ranks=4)["odd"]
    assert choice.ranks == ()
    assert words in choice.reason


def test_weights_that_are_not_finite_are_named():
    model = nn.ModuleDict({"rnn": nn.GRU(16, 16)})
    model["rnn"].weight_hh_l0.data[2, 3] = torch.nan
    with pytest.raises(ValueError, match="layer 'rnn': 1 of 1536 weights are NaN or infinite"):
        decomp.plan(model, ranks=4)


def test_sensitivities_take_recurrent_layers():
    """The measured weight is the change of the output over that of the weights, each cut at 75 % of its energy."""
    model, (words, _) = Tagger(packed=False).double(), sentences(6)
    cut = copy.deepcopy(model)
    lost = 0.0
    for name, parameter in cut.rnn.named_parameters():
        if name.startswith("weight"):
            s = torch.linalg.svdvals(parameter.data)
            rank = int((s.square().cumsum(0) / s.square().sum() < 0.75).sum()) + 1
            new = truncated(parameter.data, rank)
            lost += float((new - parameter.data).square().sum())
            parameter.data = new
    share = lost / float(weight_of(model.rnn).detach().square().sum())
    with torch.no_grad():
        before, after = model(words), cut(words)
    expected = float((after - before).square().sum() / before.square().sum()) / share
    assert decomp.sensitivity(model, [words])["rnn"] == pytest.approx(expected, rel=1e-6)
    weights = decomp.sensitivity(Tagger(), [words], loss=lambda network, batch: network(batch).square().mean())
    assert weights["rnn"] > 0


def smooth(count=4, steps=6):
    """Batches of sequences whose inputs are correlated, with few directions of large variance."""
    mixing = torch.randn(INPUTS, INPUTS, dtype=torch.float64) * 0.5 ** torch.arange(INPUTS)[:, None]
    return [torch.randn(steps, 16, INPUTS, dtype=torch.float64) @ mixing for _ in range(count)]


def received(dense, data):
    """The rows that every matrix multiplies, by a chain of one-layer modules, with their last steps."""
    rows = {"input": [], "upper": [], "recurrent": []}
    for x in data:
        for place in range(dense.num_layers):
            size = x.data.shape[-1] if isinstance(x, PackedSequence) else x.shape[-1]
            layer = type(dense)(size, HIDDEN, bidirectional=dense.bidirectional, dtype=torch.float64)
            own = {n: getattr(dense, n.replace("_l0", f"_l{place}")) for n, _ in layer.named_parameters()}
            layer.load_state_dict(own)
            flat = x.data if isinstance(x, PackedSequence) else x.reshape(-1, size)
            rows["upper" if place else "input"].append((place, flat))
            x = layer(x)[0]
            states = x.data if isinstance(x, PackedSequence) else x.reshape(-1, x.shape[-1])
            rows["recurrent"] += [
                (2 * place + direction, each) for direction, each in enumerate(states.chunk(2, -1))
            ]
    return {
        role: [torch.cat([each for own, each in found if own == place]) for place in dict(found)]
        for role, found in rows.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_moments_are_those_of_what_every_matrix_multiplies(packed):
    model = nn.Sequential(nn.GRU(INPUTS, HIDDEN, 2, bidirectional=True, dtype=torch.float64))
    data = smooth()
    lengths = torch.tensor([6, 3, 1, 5] * 4)
    given = [pack_padded_sequence(x, lengths, enforce_sorted=False) for x in data] if packed else data
    moments = decomp.calibrate(model, [(each,) if packed else each for each in given], held_out=False)["0"]
    assert moments.samples == (4 * int(lengths.sum()) if packed else 4 * 6 * 16)
    rows = received(model[0], given)
    for role, kernels in recurrent_matrices(model[0]).items():
        assert len(moments.seconds[role]) == len(kernels) == len(rows[role])
        for second, each in zip(moments.seconds[role], rows[role], strict=True):
            torch.testing.assert_close(second, each.T @ each / len(each), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_with_data_the_error_of_the_gates_is_the_true_one_and_smaller(name):
    dense = nn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    data = smooth()
    rows = received(dense, data)

    def gates(weights):
        parts = [each @ kernel.T for role in rows for each, kernel in zip(rows[role], weights[role], strict=True)]
        # The mean over the samples of each matrix: all have as many.
        return torch.cat([part.flatten() for part in parts])

    ranks = small_ranks(name, dense)
    plain = factorized(name, dense, ranks)
    statistics = decomp.calibrate(nn.Sequential(dense), data, held_out=False)
    plan = decomp.plan(nn.Sequential(dense), name, ranks=ranks, data=statistics)
    small = plan.apply(nn.Sequential(dense))
    exact = gates(recurrent_matrices(dense))
    errors = [
        float((gates(recurrent_matrices(each.to_dense())) - exact).norm() / exact.norm())
        for each in (small[0], plain)
    ]
    choice = small.decomp_plan["0"]
    assert choice.output_error == pytest.approx(errors[0], rel=1e-9)
    assert choice.error == pytest.approx(
        float((small[0].weight - weight_of(dense)).norm() / weight_of(dense).norm())
    )
    assert errors[0] < 0.8 * errors[1]
    best = {}
    moments = plan.statistics["0"]
    for role, kernels in recurrent_matrices(dense).items():
        rank_of = dict(zip(METHODS[name].rank_names, ranks, strict=False))
        pairs = zip(kernels, moments.shrunk[role], strict=True)
        roots = [(kernel, torch.linalg.cholesky(second)) for kernel, second in pairs]
        best[role] = torch.stack(
            [truncated(k @ root, rank_of.get(role, 99)) @ torch.linalg.inv(root) for k, root in roots]
        )
    ours = recurrent_matrices(small[0].to_dense())
    lost = energy = 0.0
    for role, kernels in recurrent_matrices(dense).items():
        torch.testing.assert_close(ours[role], best[role], rtol=0, atol=1e-8)
        lost += float((((ours[role] - kernels) @ moments.shrunk[role]) * (ours[role] - kernels)).sum())
        energy += float(((kernels @ moments.shrunk[role]) * kernels).sum())
    assert plan["0"].output_error == pytest.approx(
        (lost / energy) ** 0.5, rel=1e-8
    )  # planned by the shrunk moments


def test_the_importance_is_the_change_of_the_loss_by_small_random_errors():
    model = nn.Sequential(nn.GRU(INPUTS, HIDDEN, 2, dtype=torch.float64)).requires_grad_(False)
    data = smooth(2)

    def loss(network, batch):
        return network(batch)[0].square().mean()

    plan = decomp.plan(model, "svd_rnn", ranks=2, data=decomp.calibrate(model, data, loss=loss))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    candidate = plan.candidates["0"][0]
    weights = [p for n, p in model[0].named_parameters() if n.startswith("weight")]
    originals = [weight.clone() for weight in weights]
    before = [float(loss(model, batch)) for batch in data]
    step, total, draws = 1e-5, 0.0, 400
    size = float(weight_of(model[0]).norm()) / sum(weight.numel() for weight in weights) ** 0.5
    for _ in range(draws):
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original + step * size * torch.randn_like(original))
        total += sum((float(loss(model, batch)) - old) ** 2 for batch, old in zip(data, before, strict=True))
    assert candidate.importance == pytest.approx(total / draws / step**2, rel=0.2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_every_way_of_the_data_takes_recurrent_layers(kind):
    model = Tagger(kind).eval()
    data = [sentences(16)[0] for _ in range(4)]
    flags = [p.requires_grad for p in model.parameters()]
    statistics = decomp.calibrate(model, data, loss="output")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    small = decomp.compress(model, macs=0.6, data=statistics)
    assert small.decomp_plan["rnn"].output_error < small.decomp_plan["rnn"].error
    small = decomp.tucker(model, ranks={"rnn": 5, "head": 3}, data=data, sequential=True)
    assert small.decomp_plan["rnn"].ranks == (5, 5)
    report = decomp.repair(small, model, data, progress=False)
    assert report["rnn"].note == "its last factor mixes no outputs: not refitted"
    small = decomp.tucker(model, ranks={"rnn": 5}, data=data, finetune={"steps": 20})
    assert small.decomp_finetuning["rnn"].error_after <= small.decomp_finetuning["rnn"].error_before
    points = decomp.tradeoff(
        model, data[0], budgets=(0.7,), methods=("auto", ["svd", "svd_rnn"]), progress=False
    ).points
    assert len(points) == 2
    with pytest.raises(ValueError, match="the statistics are of another model, layer 'rnn'"):
        decomp.plan(Tagger(kind, hidden=20), ranks=4, data=statistics)


def test_the_layers_inside_keep_what_backward_needs_in_eval_mode():
    """cuDNN refuses the backward pass of a recurrent layer that ran in eval mode."""
    small = InputSVDRNN.like(nn.GRU(INPUTS, HIDDEN, 2, dropout=0.5), (3, 4)).eval()
    seen = []
    small.layer_l1.register_forward_hook(lambda module, args, output: seen.append(module.training))
    x = torch.randn(STEPS, BATCH, INPUTS)
    first = small(x)[0]
    with torch.no_grad():
        second = small(x)[0]
    assert seen == [True, False]
    assert torch.equal(first, second)
    assert not any(module.training for module in small.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_devices(name, kind):
    dense = KINDS[kind](INPUTS, HIDDEN, 2, bidirectional=True).cuda()
    small = factorized(name, dense, small_ranks(name, dense)).eval()
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    assert_same(small(x.cuda()), small.to_dense()(x.cuda()), atol=1e-5)
    torch.testing.assert_close(small(x.cuda())[0].cpu(), copy.deepcopy(small).cpu()(x)[0], rtol=1e-4, atol=1e-4)
    small(x.cuda())[0].sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_shared_factor_is_trained_where_one_direction_is():
    dense = nn.LSTM(INPUTS, HIDDEN, bidirectional=True)
    dense.weight_ih_l0.requires_grad_(False)
    small = factorized("svd_rnn_input", dense, (3,))
    flags = {name: p.requires_grad for name, p in small.named_parameters() if "ih" in name or "reduce" in name}
    assert flags["reduce_l0.weight"]
    assert not flags["layer_l0.weight_ih_l0"]
    assert flags["layer_l0.weight_ih_l0_reverse"]


def test_a_weight_that_has_changed_since_the_plan_has_its_own_error():
    model = nn.Sequential(nn.GRU(16, 16))
    plan = decomp.plan(model, ranks=5)
    model[0].weight_hh_l0.data.mul_(3)
    choice = plan.apply(model).decomp_plan["0"]
    assert "the weight has changed since the plan was made" in choice.note
    assert 0 < choice.error < plan["0"].error
