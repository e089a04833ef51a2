"""The arguments that calls share: complete in signatures and docstrings, typed, refused where unknown."""

import inspect
import pickle

import pytest
import torch
from torch import nn

import decomp
from decomp._util.arguments import arguments_of, with_arguments
from decomp.methods import FAMILIES, MethodOptions, default_options
from decomp.planning.arguments import Application, BudgetArguments, Scope, Selection
from decomp.planning.cost import COSTS, Bounds

DECOMPOSITIONS = (decomp.tucker, decomp.svd, decomp.cp, decomp.block_term, decomp.separable, decomp.flattened)
GROUPS = {
    **dict.fromkeys(DECOMPOSITIONS, (Scope, Application)),
    decomp.plan: (Scope, BudgetArguments, MethodOptions),
    decomp.compress: (Selection, BudgetArguments, Application),
}


@pytest.mark.parametrize("call", GROUPS, ids=lambda call: call.__name__)
def test_signature_and_docstring_hold_every_argument(call):
    parameters = inspect.signature(call).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for group in GROUPS[call]:
        for name, argument in arguments_of(group).items():
            assert parameters[name].default == argument.default
    args = call.__doc__.split("Args:")[1].split("Raises:")[0]
    for name in parameters:
        assert args.count(f"\n    {name}: ") == 1, name
    for section in ("Raises:", "Source:", ">>> "):
        assert section in call.__doc__


@pytest.mark.parametrize("call", GROUPS, ids=lambda call: call.__name__)
def test_an_unknown_argument_is_named_with_those_that_there_are(call):
    with pytest.raises(TypeError, match=rf"{call.__name__}: .*unexpected keyword argument 'layer'; .*layers="):
        call(nn.Linear(8, 8), layer="*")


def test_the_old_name_of_sequential_still_works_and_says_so():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16)), [torch.randn(32, 16) for _ in range(4)]
    with pytest.warns(DeprecationWarning, match=r"tucker: asymmetric= is now sequential="):
        old = decomp.tucker(model, ranks=4, data=data, asymmetric=True, progress=False)
    new = decomp.tucker(model, ranks=4, data=data, sequential=True, progress=False)
    assert torch.equal(old[0].dense_weight(), new[0].dense_weight())
    with pytest.raises(TypeError, match="asymmetric= is the old name of sequential=: write sequential= alone"):
        decomp.tucker(model, ranks=4, data=data, asymmetric=True, sequential=True)


def test_every_kind_of_cost_and_every_option_of_a_method_is_an_argument():
    assert list(arguments_of(Bounds)) == list(COSTS)
    options = {name for family in FAMILIES for name in default_options(family)}
    assert set(arguments_of(MethodOptions)) == options
    with pytest.raises(TypeError, match="tucker has no option fold=: write solver="):
        decomp.plan(nn.Linear(8, 8), "tucker", fold="spatial")


def test_the_decorator_keeps_the_function_as_it_is():
    assert pickle.loads(pickle.dumps(decomp.tucker)) is decomp.tucker
    assert decomp.tucker.__module__ == "decomp.api"
    with pytest.raises(ValueError, match="a docstring without Args"):
        with_arguments(Bounds)(_undocumented)


def _undocumented(model, **bounds):
    """No arguments are described here."""


def test_arguments_by_place_and_their_defaults():
    model = nn.Sequential(nn.Linear(16, 16))
    by_place = decomp.compress(model, torch.zeros(1, 16), macs=0.6)
    by_name = decomp.compress(model, example_inputs=torch.zeros(1, 16), macs=0.6)
    assert dict(by_place.decomp_plan) == dict(by_name.decomp_plan)
    with pytest.raises(TypeError, match="compress: missing a required argument: 'model'"):
        decomp.compress(macs=0.5)
