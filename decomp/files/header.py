"""The metadata of a model file: format, plan, names of shared tensors, constructor and checksums."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decomp._util.io import digest
from decomp._util.schema import Value
from decomp._util.version import installed_version
from decomp.methods import Method
from decomp.planning.plan import Plan

FAMILY = "decomp-model-"
FORMAT = f"{FAMILY}1"


def checksum(name: str, tensor: Tensor) -> str:
    """The checksum of an entry: of its name, dtype, shape and bytes."""
    return digest([json.dumps([name, str(tensor.dtype), list(tensor.shape)]), tensor.resolve_conj().resolve_neg()])


@dataclass(frozen=True)
class Header:
    """What a file says beside its tensors.

    Args:
        plan: of the compressed model.
        shared: other names of tensors, with the entry that holds each.
        not_in_state: entries that are buffers outside of the state dict.
        checksums: of every entry.
        constructor: the qualified name of what makes the dense model; empty if the file names none.
        arguments: keyword arguments of the constructor.
    """

    plan: Plan
    shared: Mapping[str, str]
    not_in_state: frozenset[str]
    checksums: Mapping[str, str]
    constructor: str
    arguments: Mapping[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """The header as the metadata of a safetensors file."""
        fields = {
            "format": FORMAT,
            "version": installed_version(),
            "plan": self.plan.to_json(),
            "shared": json.dumps(self.shared),
            "not_in_state": json.dumps(sorted(self.not_in_state)),
            "checksums": json.dumps(self.checksums),
            "constructor": json.dumps({"name": self.constructor, "arguments": self.arguments}),
        }
        return {**fields, "checksum": _of_all(fields)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, methods: Iterable[Method] = ()) -> "Header":
        """Read a header, whose plan may name methods of the user's own.

        Raises:
            ValueError: the metadata are not those of a model file, or of a newer version, or damaged.
        """
        fields = dict(metadata or {})
        found = fields.get("format", "")
        if not found.startswith(FAMILY):
            raise ValueError(
                "not a file that decomp.save wrote: it holds tensors without a plan (for weights alone, build the "
                "model by Plan.build and load them with safetensors.torch.load_model)"
            )
        if found != FORMAT:
            raise ValueError(
                f"it has the format {found!r}, written by decomp {fields.get('version', 'of another version')}; "
                f"decomp {installed_version()} reads {FORMAT!r}: install a newer decomp"
            )
        stated = fields.pop("checksum", None)
        if stated != _of_all(fields):
            raise ValueError("damaged: the checksum of its header is that of another content")
        document = Value(fields).record(
            "format", "version", "plan", "shared", "not_in_state", "checksums", "constructor"
        )
        constructor = _parsed(document["constructor"]).record("name", "arguments")
        return cls(
            plan=Plan.from_json(document["plan"].text(), methods),
            shared=_texts(_parsed(document["shared"])),
            not_in_state=frozenset(name.text() for name in _parsed(document["not_in_state"]).items()),
            checksums=_texts(_parsed(document["checksums"])),
            constructor=constructor["name"].text(),
            arguments={name: each.value for name, each in constructor["arguments"].entries().items()},
        )


def _of_all(fields: Mapping[str, str]) -> str:
    return digest(json.dumps(sorted(fields.items())))


def _parsed(field: Value) -> Value:
    return Value(Value.parse(field.text()).value, field.field)


def _texts(value: Value) -> dict[str, str]:
    return {name: text.text() for name, text in value.entries().items()}
