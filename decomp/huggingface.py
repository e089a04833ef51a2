"""Compressed models of transformers: written by ``save_pretrained``, built and loaded by ``from_pretrained``.

``import decomp.huggingface`` registers the quantization method "decomp" in transformers. A model that was
compressed by this library has it already; a program that only loads models has to import this module.

A checkpoint holds the plan in the ``quantization_config`` of its ``config.json``. Beside the factors of each
layer it holds a marker: one number under the name of the dense weight, whose shape fits no dense layer. Where
this module is not imported, transformers knows no method "decomp", warns, and would give the dense layers random
weights; because of the markers it refuses the checkpoint instead.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from decomp._util.naming import some
from decomp._util.schema import Value
from decomp._util.warn import warn
from decomp.files.checkpoints import MARKED, METHOD, class_of, compress_checkpoint
from decomp.files.save import require_described
from decomp.layers import Factorized
from decomp.methods import METHODS
from decomp.planning.cost import Cost
from decomp.planning.plan import PLAN, Plan, read_plan

__all__ = ["DecompConfig", "DecompQuantizer", "compress_checkpoint", "from_pretrained"]

_VERSION = int(transformers.__version__.split(".")[0])
OF_THE_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


@register_quantization_config(METHOD)
class DecompConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed model: its plan, as the JSON of :meth:`Plan.to_json`.

    Raises:
        ValueError: this is no plan; the message names the field.
    """

    def __init__(self, plan: Mapping[str, Any], quant_method: str = METHOD, **unknown: Any) -> None:
        if unknown or quant_method != METHOD:
            raise ValueError(f"quantization_config: unknown fields {sorted(unknown)} of method {quant_method!r}")
        self.quant_method = quant_method
        self.plan = plan
        self.to_plan()

    def to_plan(self) -> Plan:
        """The plan."""
        try:
            return read_plan(Value(self.plan))
        except ValueError as error:
            raise ValueError(f"quantization_config.plan: not a plan of decomp: {error}") from None

    @classmethod
    def of(cls, plan: Plan) -> "DecompConfig":
        """The configuration of a plan."""
        return cls(json.loads(plan.to_json()))


@register_quantizer(METHOD)
class DecompQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks when it saves or loads a compressed model."""

    def __init__(self, quantization_config: DecompConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config=DecompConfig(...) cannot compress a model while it is loaded: load the dense "
                "model, and compress it by decomp.compress, decomp.svd or another call"
            )

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All parameters can be trained, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *_: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state to save: that of the model, and a marker for each factorized layer.

        Raises:
            ValueError: the model has other factorized layers than the plan says; the message names one.
        """
        plan = self.quantization_config.to_plan()
        require_described(model, plan)
        own = next((name for name, choice in plan.items() if choice.ranks and choice.method not in METHODS), None)
        if own is not None:
            raise ValueError(
                f"layer {own!r} was decomposed by a method of your own, {plan[own].method!r}, which "
                "from_pretrained would not find: use decomp.save, and decomp.load(path, model, methods=[...])"
            )
        model.config.quantization_config = self.quantization_config  # a part of the model may have been saved last
        state = dict(model.state_dict())
        # Conversions to the names of the original checkpoint split and join dense weights, and know no factors.
        vars(model)["_weight_conversions"] = []
        for name in _factorized(model):
            factor = next(model.get_submodule(name).parameters())
            state[f"{name}.weight"] = torch.zeros(1, dtype=factor.dtype)
        return state, {MARKED: "true"}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        plan = _for_class(self.quantization_config.to_plan(), model)
        if not any(choice.ranks for choice in plan.values()):
            return  # what was compressed is a head that this class does not have
        plan.build(model, inplace=True)
        _require_factors(model, [str(file) for file in options.get("checkpoint_files") or ()])
        prefix = f"{model.base_model_prefix}."  # the checkpoint may be of the base alone
        markers = {rf"(^|\.){re.escape(name.removeprefix(prefix))}\.weight$" for name in _factorized(model)}
        self._ignored_before = model._keys_to_ignore_on_load_unexpected
        ignored = {*(self._ignored_before or ()), *markers}
        model._keys_to_ignore_on_load_unexpected = ignored if _VERSION >= 5 else list(ignored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if isinstance(getattr(model, PLAN, None), Plan):
            model._keys_to_ignore_on_load_unexpected = self._ignored_before
        attach(model)


def _factorized(model: nn.Module) -> Iterator[str]:
    """Every name of every factorized layer."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Factorized):
            yield name


def attach(model: nn.Module) -> None:
    """Let every model of transformers in ``model`` save what is compressed in it.

    Called after each call that swaps layers, also back to dense ones. A model inside of another one, such as
    ``bert`` in ``BertForMaskedLM``, can be saved by itself.
    """
    plan = getattr(model, PLAN, None)
    configured: set[int] = set()
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        compressed = plan is not None and any(True for _ in _factorized(part))
        quantizer = getattr(part, "hf_quantizer", None)
        if quantizer is not None and not isinstance(quantizer, DecompQuantizer):
            vars(quantizer).pop("is_serializable", None)
            if compressed:
                quantizer.is_serializable = _not_serializable
            continue
        config, configurable = part.config, id(part.config) not in configured
        configured.add(id(config))
        if compressed:
            part.hf_quantizer = DecompQuantizer(DecompConfig.of(_part(cast(Plan, plan), name, part)))
            if configurable:
                config.quantization_config = part.hf_quantizer.quantization_config
        elif quantizer is not None:
            del part.hf_quantizer
            if configurable and isinstance(getattr(config, "quantization_config", None), DecompConfig):
                del config.quantization_config
        for mark in ("is_quantized", "quantization_method"):  # from_pretrained sets them: .half() would be refused
            vars(part).pop(mark, None)


def _not_serializable(*_: Any, **__: Any) -> bool:
    """In place of ``is_serializable`` of another quantizer, which would save the plan of neither."""
    warn(
        "a model of transformers that is quantized and compressed by decomp as well cannot be saved by "
        "save_pretrained: compress the model first, save it, and quantize what was loaded"
    )
    return False


def _part(plan: Plan, name: str, part: nn.Module) -> Plan:
    """The plan of a module inside of the model; MACs of such a part are not known."""
    if not name:
        return plan
    names = {each: each.removeprefix(f"{name}.") for each in plan if each.startswith(f"{name}.")}
    now = _counted(part)
    before = {kind: now[kind] + sum(int(plan[each].saved(kind)) for each in names) for kind in now}
    return plan.renamed(names, Cost(before))


def _for_class(plan: Plan, model: PreTrainedModel) -> Plan:
    """The plan under the names that layers have in this class, which may have another head, or none.

    transformers loads the base of a model into a class with a head, and the other way round: names then gain or
    lose the prefix of the base. Layers of a head that the class does not have are left out.
    """
    prefix = f"{model.base_model_prefix}."
    places = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    has_head = any(name.startswith(prefix) for name in plan)
    names = {}
    for name in plan:
        possible = [name, f"{prefix}{name}", name.removeprefix(prefix)]
        found = next((each for each in possible if each in places), None)
        if found is not None or not has_head or name.startswith(prefix):
            names[name] = found or name
    # config.json has the layers in the order of the alphabet: the order of the model is that of every other plan.
    names = dict(sorted(names.items(), key=lambda pair: places.get(pair[1], len(places))))
    return plan.renamed(names, None if set(names.values()) == set(plan) else _counted(model))


def _counted(model: nn.Module) -> Cost:
    """The costs that are known without inputs."""
    cost = Cost.of(model)
    return Cost({kind: cost[kind] for kind in ("params", "bytes")})


def _require_factors(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Refuse a checkpoint without factors: transformers would give them random values.

    It comes about where a dense model is made from the configuration of a compressed one, and saved.

    Raises:
        ValueError: no file holds a factor of any layer.
    """
    layers = {name: model.get_submodule(name) for name in _factorized(model)}
    factors = {f"{name}.{child}" for name, layer in layers.items() for child, _ in layer.named_parameters()}
    names: set[str] = set()
    for file in files:
        if not file.endswith(".safetensors"):
            return
        with safe_open(file, framework="pt") as opened:
            entries: Any = opened
            if MARKED in (entries.metadata() or {}):
                return
            names.update(entries.keys())
    prefix = f"{model.base_model_prefix}."
    if files and not any({name, f"{prefix}{name}", name.removeprefix(prefix)} & factors for name in names):
        raise ValueError(
            f"{str(files[0])!r} holds dense layers, and its config.json the plan of a compressed model: save the "
            "compressed model again, or remove quantization_config from config.json"
        )


def is_compressed(folder: str | Path, **options: Any) -> bool:
    """Whether the ``config.json`` of a model says that decomp compressed it."""
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    stated = getattr(config, "quantization_config", None)
    return isinstance(stated, dict) and stated.get("quant_method") == METHOD


def from_pretrained(folder: str | Path, *arguments: Any, **options: Any) -> PreTrainedModel:
    """Load a compressed model that ``small.save_pretrained(folder)`` wrote, in the class that it had.

    The same as ``from_pretrained`` of that class, but a checkpoint of which anything is missing or left over is
    refused.

    Args:
        folder: with ``config.json`` and the weights, or the name of a repository.
        arguments: for ``from_pretrained`` of transformers.
        options: likewise, for example ``device_map="auto"`` or ``dtype=torch.bfloat16``.

    Raises:
        ValueError: the model is not a compressed one, or keys are missing, unexpected or of another shape.
    """
    of_the_hub = {k: v for k, v in options.items() if k in OF_THE_HUB}
    if not is_compressed(folder, **of_the_hub):
        raise ValueError(
            f"{str(folder)!r} is no compressed model of decomp: its config.json has no quantization_config with "
            f'"quant_method": "{METHOD}"'
        )
    kind, _ = class_of(folder, **of_the_hub)
    model, info = kind.from_pretrained(folder, *arguments, **{**options, "output_loading_info": True})
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ValueError(
                f"{str(folder)!r}: {problem.replace('_', ' ')}: {some(sorted(map(str, info[problem])))}"
            )
    return cast(PreTrainedModel, model)
