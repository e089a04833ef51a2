"""A model as a graph of tensors, by torch.export: what all runtimes outside of PyTorch are made from."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from decomp.network.forward import arguments, call, describe, evaluating, moved

Array = NDArray[Any]
PRODUCTS = ("matmul", "mm", "mv", "bmm", "baddbmm", "einsum")
# What may stand between the weights of attention and their product with the values.
PASSED_ON = {
    *("dropout", "to", "_to_copy", "type_as", "expand", "view", "reshape", "transpose", "permute", "clone"),
    *("contiguous", "masked_fill", "where", "nan_to_num", "mul", "div", "add", "slice", "select", "index"),
    *("squeeze", "unsqueeze"),
}


@dataclass(frozen=True)
class Program:
    """An exported model: the graph, the names of its inputs and outputs, and what to put around its outputs.

    ``fixed_batch`` says why the first axis could not be left open; it is empty where it was. ``attends`` says
    whether there is attention in the model, which quantizers treat in ways of their own.
    """

    exported: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keywords: tuple[str, ...]
    template: Any
    fixed_batch: str
    attends: bool

    def arrays(self, batch: Any) -> list[Array]:
        """The tensors of a batch in the order of the inputs.

        Raises:
            ValueError: the batch has other tensors than the example that the model was exported with.
        """
        positional, named = arguments(batch)
        ordered = {name: named[name] for name in self.keywords if name in named}
        tensors = [leaf for leaf in pytree.tree_leaves((positional, ordered)) if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.inputs) or len(ordered) != len(named):
            raise ValueError(
                f"the model was exported for the inputs {', '.join(self.inputs)}, not for {describe(batch)}"
            )
        return [tensor.detach().cpu().numpy() for tensor in tensors]

    def result(self, arrays: Sequence[Array]) -> Any:
        """Outputs in the structure that the model returns."""
        leaves, spec = pytree.tree_flatten(self.template)
        given = iter(arrays)
        filled = [torch.from_numpy(np.array(next(given))) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, spec)


def export_program(model: nn.Module, example_inputs: Any) -> Program:
    """Export a model with its first axis open where that is possible.

    A batch of one is doubled for the export, since torch.export takes an axis of length one as fixed.

    Raises:
        TypeError: torch.export cannot export the model, or the batch does not fit; the message says why.
    """
    with evaluating(model), torch.no_grad(), quiet():
        example_inputs = moved(example_inputs, torch.device("cpu"))
        on_cpu = model
        if any(p.device.type != "cpu" for p in model.parameters()):
            from decomp.network.surgery import swap

            on_cpu = swap(model, {}, inplace=False).cpu()
        template = call(on_cpu, example_inputs)
        doubled = pytree.tree_map_only(Tensor, _doubled, example_inputs)
        exported, reason = None, ""
        if _scales(template, on_cpu, doubled):
            try:
                exported = _export(on_cpu, doubled, dynamic=True)
            except Exception as error:  # of whatever in the model that depends on the size of the batch
                reason = str(error).strip().partition("\n")[0][:200]
        else:
            reason = "the first axis of the outputs does not grow with that of the inputs"
        if exported is None:
            try:
                exported = _export(on_cpu, example_inputs, dynamic=False)
            except Exception as error:
                raise TypeError(
                    f"torch.export cannot export {type(model).__name__}: {str(error).strip()[:600]}"
                ) from error
    signature = exported.graph_signature
    user = [each.arg for each in signature.input_specs if each.kind.name == "USER_INPUT"]
    inputs = tuple(each.name for each in user if type(each).__name__ == "TensorArgument")
    keywords, attends = tuple(arguments(example_inputs)[1]), _attends(exported.graph)
    return Program(exported, inputs, _output_names(template), keywords, template, reason, attends)


def _attends(graph: torch.fx.Graph) -> bool:
    """Whether a graph has attention: a call of the fused function, or a softmax whose result is multiplied."""
    fused = any(_operation(node) == "scaled_dot_product_attention" for node in graph.nodes)
    return fused or any(_is_multiplied(node) for node in graph.nodes if "softmax" in _operation(node))


def _is_multiplied(node: torch.fx.Node) -> bool:
    users = ((_operation(user), user) for user in node.users)
    return any(name in PRODUCTS or (name in PASSED_ON and _is_multiplied(user)) for name, user in users)


def _operation(node: torch.fx.Node) -> str:
    """The name of the function that a node calls, without its namespace and overload; "" for other nodes."""
    return getattr(node.target, "_opname", "")


def _doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == 1 else tensor


def _scales(template: Any, model: nn.Module, doubled: Any) -> bool:
    """Whether every output keeps or doubles its first axis where those of the inputs are doubled."""
    try:
        result = call(model, doubled)
    except Exception:
        return False
    pairs = zip(_tensors(template), _tensors(result), strict=True)
    return all(one.shape[1:] == other.shape[1:] for one, other in pairs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _export(model: nn.Module, batch: Any, *, dynamic: bool) -> Any:
    positional, named = arguments(batch)
    open_axis = {0: torch.export.Dim.AUTO}
    shapes = None
    if dynamic:
        axes = pytree.tree_map(
            lambda leaf: open_axis if isinstance(leaf, Tensor) and leaf.dim() else None, (positional, named)
        )
        shapes = axes[1] if named else axes[0]
    return torch.export.export(model, positional, named, dynamic_shapes=shapes)


def _output_names(template: Any) -> tuple[str, ...]:
    """Names of the outputs: "output", the keys of a dict or a dataclass, or "output_0" and so on."""
    entries, _ = pytree.tree_flatten_with_path(template)
    names: list[str] = []
    for path, leaf in entries:
        if not isinstance(leaf, Tensor):
            continue
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        text = "_".join("".join(c if c.isalnum() or c == "_" else "_" for c in part) for part in parts)
        names.append(text if text and not text[0].isdigit() else f"output_{text}".rstrip("_"))
    return tuple(names)


@contextmanager
def quiet() -> Iterator[None]:
    """Run the block without the notes of exporters and quantizers, which name nothing that a caller could do."""
    names = ("torch.export", "torch.onnx", "torch._export", "torch.fx", "nncf", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
