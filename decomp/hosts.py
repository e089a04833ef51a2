"""Frameworks whose models keep a record of how they were changed: they are told after each swap of layers."""

from types import SimpleNamespace

from torch import nn

_PRETRAINED_MODEL = ("transformers.modeling_utils", "PreTrainedModel")


def tell_transformers(model: nn.Module) -> None:
    """Let models of transformers save and load what is compressed in them; see ``decomp.huggingface``.

    transformers is imported only for models that are its own, which have imported it. With a version of it that
    knows no quantizers of others, ``save_pretrained`` of these models raises.
    """
    own = [module for module in model.modules() if _is_pretrained(module)]
    if not own:
        return
    try:
        from decomp.huggingface import attach
    except ImportError as error:
        _refuse_to_save(own, f"decomp (not saved by this version of transformers: {error}; use decomp.save)")
        return
    attach(model)


def _is_pretrained(module: nn.Module) -> bool:
    return any((kind.__module__, kind.__qualname__) == _PRETRAINED_MODEL for kind in type(module).__mro__)


def _refuse_to_save(models: list[nn.Module], reason: str) -> None:
    """Let ``save_pretrained`` raise, which names the method of quantization that it cannot write."""
    for model in models:
        vars(model)["hf_quantizer"] = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=reason))
