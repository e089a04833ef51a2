"""The factorized layers of a network beside the dense layers that they stand for."""

from torch import nn

from decomp.layers import Factorized


def pairs_of(small: nn.Module, dense: nn.Module) -> dict[str, tuple[Factorized, nn.Module]]:
    """The factorized layers of ``small`` and the layers of ``dense`` that they stand for, by name.

    Raises:
        ValueError: ``small`` has none, or ``dense`` is another model.
    """
    factorized = {name: module for name, module in small.named_modules() if isinstance(module, Factorized)}
    known = dict(dense.named_modules())
    if not factorized:
        swapped = any(isinstance(module, Factorized) for module in known.values())
        hint = "the order of arguments is (small, dense, data)" if swapped else "compress the model first"
        raise ValueError(f"small has no factorized layer: {hint}")
    for name, layer in factorized.items():
        twin = known.get(name)
        shape = getattr(getattr(twin, "weight", None), "shape", None)
        if twin is None or isinstance(twin, Factorized) or shape != layer.dense_shape:
            found = "nothing" if twin is None else type(twin).__name__ + f" with weight {shape}"
            raise ValueError(
                f"layer {name!r}: dense has {found} where small has {type(layer).__name__} of weight "
                f"{layer.dense_shape}: give the model that small was made from"
            )
    return {name: (layer, known[name]) for name, layer in factorized.items()}
