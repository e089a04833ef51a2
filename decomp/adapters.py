"""Low-rank adapters (LoRA) of peft on factorized layers."""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.layers import SVDLinear, group_kernels
from decomp.layers.kernels import is_input_first

_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Those that leave the weight of the adapted layer as it is."""


def accept_factorized(config: Any) -> Any:
    """Let a ``peft.LoraConfig`` adapt factorized linear layers under the names of the dense ones.

    y = B A x + s L_B L_A x, with B A the factors of the layer, which stay frozen, and s L_B L_A the adapter of
    peft. ``merge_and_unload`` merges without an error: the factors become [B, s L_B] and [A; L_A], of rank
    r + r_LoRA, or a dense layer where that is no more expensive. ``merge_adapter`` is refused: the sum is not a
    product of factors of the same shape.

    Args:
        config: a ``peft.LoraConfig``; changed in place, and returned.

    Raises:
        ImportError: peft is not installed.
        ValueError: the configuration writes to, or scales, the weight of the adapted layer: initialization by
            PiSSA, OLoRA, CorDA or LoftQ, or DoRA.

    Source: Hu et al. 2022 (LoRA: low-rank adaptation of large language models), section 4.1.

    >>> import decomp
    >>> from peft import LoraConfig, get_peft_model
    >>> dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> small = decomp.svd(dense, ranks=4, layers="0")
    >>> config = accept_factorized(LoraConfig(target_modules=["0"], r=2))
    >>> adapted = get_peft_model(small, config)
    >>> adapted.merge_and_unload()[0].ranks
    (6,)
    """
    _require_supported(config)
    config._register_custom_module({SVDLinear: _lora_layer()})
    return config


def _require_supported(config: Any) -> None:
    initialization = getattr(config, "init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights={initialization!r} may write to the weight of the adapted layer, which for a "
            f"factorized one is a product: write one of {list(_INITIALIZATIONS)}"
        )
    if getattr(config, "use_dora", False):
        raise ValueError("use_dora=True scales the weight of the adapted layer, which a factorized one has not")


def __getattr__(name: str) -> Any:
    """``FactorizedLinear`` by its name, with which models that hold one are pickled."""
    if name == "FactorizedLinear":
        return _lora_layer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _lora_layer() -> type[nn.Module]:
    """The layer of peft for a factorized linear layer; a function, so that peft is imported only when needed."""
    try:
        from peft.tuners.lora.layer import Linear, check_adapters_to_merge
    except ModuleNotFoundError as error:
        raise ImportError("adapters need peft: pip install peft") from error

    class FactorizedLinear(Linear):  # type: ignore[misc]
        """LoRA on an :class:`SVDLinear`."""

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            outputs, inputs = _sizes(module)
            return inputs, outputs

        def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            if "config" in kwargs:
                _require_supported(kwargs["config"])
            super().update_layer(adapter_name, *args, **kwargs)
            if adapter_name in getattr(self, "lora_variant", {}):
                kind = type(self.lora_variant[adapter_name]).__name__
                raise ValueError(
                    f"adapter {adapter_name!r} is a {kind}: plain LoRA alone runs on factorized layers"
                )

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise ValueError(
                "an adapter cannot be merged into the factors of a layer in place: call merge_and_unload(), which "
                "gives the layer more components"
            )

        def unload_and_optionally_merge_module(
            self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
        ) -> nn.Module:
            base = self.get_base_layer()
            names = check_adapters_to_merge(self, adapter_names) if merge else []
            for name in (name for name in names if name in self.lora_A):
                bias = self.lora_B[name].bias
                base = _merged(
                    base,
                    self.lora_B[name].weight * self.scaling[name],
                    self.lora_A[name].weight,
                    None if bias is None else bias * self.scaling[name],
                )
                if safe_merge and not all(bool(torch.isfinite(p).all()) for p in base.parameters()):
                    raise ValueError(f"adapter {name!r} gives weights that are NaN or infinite: it was not merged")
            self.base_layer = base  # peft sets the weight of what is returned to that of this attribute
            return base  # type: ignore[no-any-return]

    FactorizedLinear.__qualname__ = "FactorizedLinear"
    return FactorizedLinear


def _sizes(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a factorized linear layer."""
    outputs, inputs = reversed(layer.dense_shape) if layer.input_first else layer.dense_shape
    return outputs, inputs


@torch.no_grad()
def _merged(layer: Any, left: Tensor, right: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer of the weight B A + L_B L_A: one with r + r_LoRA components, or dense if that is no larger."""
    if bias is not None and layer.bias is None:
        raise ValueError("lora_bias=True: the adapted layer has no bias that could take that of the adapter")
    dense: Any = layer
    if isinstance(layer, SVDLinear):  # an earlier adapter may have made it dense
        outputs, inputs = _sizes(layer)
        dense = layer.to_dense()
        left, right = left.to(dense.weight.dtype), right.to(dense.weight.dtype)
        if bias is not None:
            dense.bias += bias.to(dense.bias.dtype)
        if (layer.ranks[0] + len(right)) * (outputs + inputs) < outputs * inputs:
            factors = group_kernels(layer.expand)[0], group_kernels(layer.reduce)[0]
            return SVDLinear.from_factors(
                dense, (torch.cat([factors[0], left], 1), torch.cat([factors[1], right]))
            )
    elif bias is not None:
        dense.bias += bias.to(dense.bias.dtype)
    delta = (left @ right).to(dense.weight.dtype)
    dense.weight += delta.mT if is_input_first(dense) else delta
    return cast(nn.Module, dense)
