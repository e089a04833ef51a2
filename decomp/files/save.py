"""``decomp.save``: a compressed model into one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from decomp._util.io import replacing
from decomp.files.constructors import Constructor, describe
from decomp.files.contents import Contents
from decomp.files.header import Header, checksum
from decomp.layers import Factorized
from decomp.methods import METHODS
from decomp.network import surgery
from decomp.planning.plan import PLAN, Plan


def save(
    model: nn.Module,
    path: str | Path,
    *,
    constructor: Constructor | str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write a compressed model to one file: its weights and its plan, with checksums.

    The file is in the format of safetensors, the plan (with its request and errors) is JSON in its header: reading
    it runs no code. It holds every parameter and buffer in its dtype; tensors that are shared are written once. It
    is written to a temporary file first, so that ``path`` has either its old or its whole new content.

    Args:
        model: what ``decomp.tucker``, ``compress``, ``Plan.apply`` or another call returned.
        path: of the file, usually with the ending ``.safetensors``; an existing one is replaced.
        constructor: the class or function that makes the dense model, or its name ("mypackage.models.Net"). With
            it :func:`load` needs no model, if its caller allows the name.
        arguments: keyword arguments of ``constructor``: numbers, strings, lists and dicts.

    Raises:
        ValueError: the model has no plan, or another structure than its plan says; or the constructor cannot be
            imported.
        TypeError: the model is wrapped, or holds something that is no plain tensor; the message names it.

    >>> import tempfile, torch
    >>> from decomp import load, svd
    >>> path = f"{tempfile.mkdtemp()}/small.safetensors"
    >>> small = svd(nn.Sequential(nn.Linear(64, 64)), ranks=8)
    >>> save(small, path)
    >>> again = load(path, nn.Sequential(nn.Linear(64, 64)))
    >>> torch.equal(again[0].expand.weight, small[0].expand.weight)
    True
    """
    surgery.check_model(model)
    plan = getattr(model, PLAN, None)
    if not isinstance(plan, Plan):
        raise ValueError(
            "the model has no plan (decomp_plan): decomp.save writes what decomp.tucker, compress, Plan.apply and "
            "Plan.build return; dense models are saved by torch.save(model.state_dict(), path)"
        )
    require_described(model, plan)
    name, stored = describe(constructor, arguments)
    contents = Contents.of(model)
    tensors = {
        key: tensor.resolve_conj().resolve_neg().cpu().contiguous() for key, tensor in contents.tensors.items()
    }
    header = Header(
        plan,
        contents.shared,
        frozenset(contents.not_in_state),
        {key: checksum(key, tensor) for key, tensor in tensors.items()},
        name,
        stored,
    )
    with replacing(Path(path)) as temporary:
        try:
            safetensors.torch.save_file(_apart(tensors), temporary, header.to_metadata())
        except KeyError as error:  # so says safetensors of a dtype that it does not have
            refused = next((key for key, tensor in tensors.items() if tensor.dtype == error.args[0]), "a tensor")
            raise TypeError(f"{refused!r} is of dtype {error}, which safetensors cannot hold") from None


def _apart(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of those tensors that overlap others without being the same: safetensors takes none that do."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def require_described(model: nn.Module, plan: Plan) -> None:
    """Check that a plan describes the factorized layers of a model, so that it can build them.

    Raises:
        ValueError: a layer is not as the plan says; the message names the layer.
    """
    planned = {name for name, choice in plan.items() if choice.ranks}
    for module, names in surgery.names_of(model):
        known = planned.intersection(names)
        if not isinstance(module, Factorized):
            if known:
                raise ValueError(
                    f"layer {min(known)!r} is a {type(module).__name__}, the plan of the model says "
                    f"{plan[min(known)].method}: it was replaced after the model was compressed"
                )
            continue
        first, kind = names[0], type(module).__name__
        if not known:
            raise ValueError(f"layer {first!r} is a {kind}, of which the plan of the model says nothing")
        choice = plan[min(known)]
        # A layer of a method of the user's own may be one of ours, which states the name of our method.
        method = module.method if choice.method in METHODS else choice.method
        if (method, module.ranks) != (choice.method, choice.ranks):
            raise ValueError(
                f"layer {first!r} is {method} of ranks {module.ranks}, the plan of the model says "
                f"{choice.method} of ranks {choice.ranks}"
            )
        for role, factor in module.named_children():
            reason = surgery.reparametrization(factor)
            if reason:
                raise ValueError(f"layer {first!r}: its factor {role!r} is {reason}")
        planned -= known
    if planned:
        raise ValueError(f"the plan of the model replaces layer {min(planned)!r}, which the model does not have")
