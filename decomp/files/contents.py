"""The tensors of a model by name: which a file holds, which are one tensor, and which are not in the state."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Place(NamedTuple):
    """A parameter or buffer, and the module that holds it."""

    module: nn.Module
    attribute: str
    tensor: Tensor
    persistent: bool

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, else it is a buffer."""
        return self.attribute in self.module._parameters

    def put(self, tensor: Tensor) -> None:
        """Put another tensor in the place of this one."""
        held = self.module._parameters if self.is_parameter else self.module._buffers
        held[self.attribute] = tensor  # type: ignore[assignment]


def places(model: nn.Module) -> dict[str, Place]:
    """Every parameter and buffer under each of its names, whatever hooks the model has on its state dict."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                persistent = attribute not in module._non_persistent_buffers_set
                found[f"{name}.{attribute}" if name else attribute] = Place(module, attribute, tensor, persistent)
    return found


@dataclass(frozen=True)
class Contents:
    """What a file holds of a model.

    Args:
        tensors: each tensor once, under its first name.
        shared: the other names of these tensors, with the first name of each.
        not_in_state: names of buffers that are not persistent.
    """

    tensors: dict[str, Tensor]
    shared: dict[str, str]
    not_in_state: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> "Contents":
        """Collect the tensors of a model; they are not copied.

        Raises:
            TypeError: a tensor has no values, or is of a kind that safetensors cannot hold, or a module keeps an
                extra state; the message names it.
        """
        _refuse_extra_states(model)
        tensors: dict[str, Tensor] = {}
        shared: dict[str, str] = {}
        first_name: dict[object, str] = {}
        found = places(model)
        for name, place in found.items():
            _require_plain(name, place.tensor)
            first = first_name.setdefault(_identity(place.tensor), name)
            if first == name:
                tensors[name] = place.tensor.detach()
            else:
                shared[name] = first
        return cls(tensors, shared, [name for name, place in found.items() if not place.persistent])


def _identity(tensor: Tensor) -> object:
    """What two names of the same values have in common; tensors without elements are never the same."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _require_plain(name: str, tensor: Tensor) -> None:
    reason = ""
    if is_lazy(tensor):
        reason = "is not initialized yet: run one batch through the model first"
    elif tensor.is_meta:
        reason = "is on the meta device, without values: bring the model to a device first"
    elif is_traceable_wrapper_subclass(tensor) or tensor.is_quantized or tensor.layout is not torch.strided:
        reason = (
            f"is a {type(tensor).__name__} (sharded, quantized or sparse), not a plain tensor: save the model "
            "before it is sharded or quantized"
        )
    if reason:
        raise TypeError(f"{name!r} {reason}")


def _refuse_extra_states(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state and module.get_extra_state():
            raise TypeError(
                f"module {name!r} ({type(module).__name__}) keeps an extra state (get_extra_state) beside its "
                "tensors, which the file cannot hold: put it into buffers"
            )
