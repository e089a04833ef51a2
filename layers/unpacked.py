"""The base of modules that call the layers which a module of torch or of a library packs into its own weights."""

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from decomp.layers.factorized import attributes_of, is_plain


class Unpacked(nn.Module):
    """A module in place of one that multiplies by its weights without calling layers: here ``roles`` are layers.

    ``part`` is the type of a dense one. Outputs, arguments and attributes are those of the packed module, whose
    type is ``dense_type``.

    Args:
        packed: the module to copy.
        parts: layers to take in place of the dense ones, by role.
        share: use the memory of the packed weights instead of copying it.
    """

    roles: ClassVar[tuple[str, ...]]
    part: ClassVar[type[nn.Module]]
    dense_type: type[nn.Module]

    def __init__(
        self, packed: nn.Module, parts: Mapping[str, nn.Module] | None = None, *, share: bool = False
    ) -> None:
        super().__init__()
        take_plain_attributes(self, packed)
        self.dense_type = type(packed)
        self.unpack(packed, parts or {}, share=share)

    @classmethod
    @abstractmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a module is of the kind that this one unpacks."""

    @classmethod
    @abstractmethod
    def weights_of(cls, packed: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The weight and the bias of each role, without copying them."""

    @abstractmethod
    def unpack(self, packed: Any, parts: Mapping[str, nn.Module], *, share: bool) -> None:
        """Create the children."""

    @abstractmethod
    def packed(self, parts: Mapping[str, nn.Module] | None = None) -> nn.Module:
        """Build the packed module with these layers, which must all be dense.

        Args:
            parts: layers to take in place of its own, by role.
        """

    def layers(self, parts: Mapping[str, nn.Module] | None = None) -> dict[str, Any]:
        """The layers by role, with some of them replaced by ``parts``."""
        return {role: (parts or {}).get(role, getattr(self, role)) for role in self.roles}

    @classmethod
    def of(cls, packed: nn.Module) -> Self:
        """Unpack a module in the memory of its weights."""
        return cls(packed, share=True)


def take_plain_attributes(new: nn.Module, old: nn.Module) -> None:
    """Set on a module the numbers, strings and the like that were set on another one."""
    for name, value in attributes_of(old):
        if is_plain(value) and not hasattr(new, name):
            setattr(new, name, copy.deepcopy(value))


def parameter_like(source: Tensor, *, share: bool) -> nn.Parameter:
    """A parameter with the values of a tensor, trained if that is; with ``share`` in its memory."""
    values = source.detach()
    return nn.Parameter(values if share else values.clone(), requires_grad=source.requires_grad)
