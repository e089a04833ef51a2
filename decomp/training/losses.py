"""Losses for :func:`decomp.finetune`: cross-entropy, and distillation from a teacher.

A loss is a function ``(model, batch) -> scalar tensor``; write your own in the same form.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from decomp.network.forward import Unfused, call, evaluating, hooked, to_device_of
from decomp.network.restoring import all_or_nothing

Loss = Callable[[nn.Module, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """-log softmax(model(inputs))[labels], the mean over a batch of (inputs, labels).

    >>> batch = (torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> float(cross_entropy(nn.Identity(), batch).exp())
    4.0

    Raises:
        TypeError: the batch is not (inputs, labels).
    """
    inputs, labels = _labelled(batch)
    return functional.cross_entropy(logits_of(call(model, inputs)), labels)


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the last dimension, the mean over the others.

    The factor T^2 keeps the gradients as large at every temperature. Source: Hinton, Vinyals and Dean 2015.

    >>> float(soft_targets(torch.ones(2, 3), torch.zeros(2, 3)))
    0.0
    """
    log_p = functional.log_softmax(_at_least_float32(teacher) / temperature, -1)
    log_q = functional.log_softmax(_at_least_float32(student) / temperature, -1)
    divergence: Tensor = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return temperature**2 * divergence


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """||student - teacher||^2 / 2, the mean over the examples of the batch.

    Source: FitNets (Romero et al. 2015), equation 3; no regressor, because a layer keeps its shape when it is
    factorized.

    >>> float(hint(torch.ones(2, 3), torch.zeros(2, 3)))
    1.5
    """
    return (_at_least_float32(student) - _at_least_float32(teacher)).square().sum() / (2 * student.shape[0])


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """|| Q_S / ||Q_S|| - Q_T / ||Q_T|| || / 2 with Q = sum over channels of |feature|^2, the mean over the batch.

    Features are (batch, channels, positions ...). Source: Zagoruyko and Komodakis 2017, equation 2, with p = 2.

    >>> feature = torch.rand(2, 3, 4, 4)
    >>> float(attention_transfer(feature, 2 * feature)) < 1e-6
    True
    """
    maps = [
        functional.normalize(_at_least_float32(feature).square().sum(1).flatten(1), dim=1)
        for feature in (student, teacher)
    ]
    distances: Tensor = torch.linalg.vector_norm(maps[0] - maps[1], dim=1)
    return distances.mean() / 2


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returned: the tensor itself, its ``logits``, or the first of a tuple.

    Raises:
        TypeError: there are none.
    """
    logits = outputs
    if not isinstance(outputs, Tensor):
        is_mapping = isinstance(outputs, Mapping)
        logits = outputs.get("logits") if is_mapping else getattr(outputs, "logits", None)
        if logits is None and isinstance(outputs, tuple | list) and outputs:
            logits = outputs[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned a {type(outputs).__name__} without logits: write a loss of your own, "
            "a function (model, batch) -> scalar tensor"
        )
    return logits


class Distillation:
    """A loss: soft targets of a teacher, features of its layers, and the task, in one pass of each network.

    ``soft * soft_targets + hard * task + sum of weight * hint + sum of weight * attention_transfer``.

    Args:
        teacher: the dense model; it runs in eval mode, without gradients.
        temperature: T of :func:`soft_targets`.
        soft: weight of the soft targets.
        hard: weight of the task's loss.
        task: the task's loss, a function of what the model returned and of the batch; by default cross-entropy
            with ``batch[1]``.
        hints: weights by layer name, for :func:`hint`.
        attention: weights by layer name, for :func:`attention_transfer`.
        inputs: what the models are called with, from a batch: ``lambda batch: batch[0]`` where labels come along.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    >>> settings = {"hints": {"0": 0.1}, "hard": 1.0}
    >>> loss = Distillation(net, **settings, inputs=lambda batch: batch[0])
    >>> batch = (torch.randn(2, 4), torch.tensor([0, 2]))
    >>> torch.allclose(loss(net, batch), cross_entropy(net, batch))
    True
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        soft: float = 1.0,
        hard: float = 0.0,
        task: Callable[[Any, Any], Tensor] | None = None,
        hints: Mapping[str, float] | None = None,
        attention: Mapping[str, float] | None = None,
        inputs: Callable[[Any], Any] | None = None,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: write a number above 0")
        self.teacher = teacher
        self._temperature, self._soft, self._hard = temperature, soft, hard
        self._task = task or _cross_entropy_of
        self._hints, self._attention = dict(hints or {}), dict(attention or {})
        self._inputs = inputs or (lambda batch: batch)

    @all_or_nothing()
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        arguments = self._inputs(batch)
        names = {*self._hints, *self._attention}
        with evaluating(self.teacher), torch.no_grad(), _features(self.teacher, names) as of_teacher:
            targets = call(self.teacher, to_device_of(self.teacher, arguments))
        with _features(model, names) as of_student:
            outputs = call(model, arguments)
        terms = []
        if self._soft:
            terms.append(self._soft * soft_targets(logits_of(outputs), logits_of(targets), self._temperature))
        if self._hard:
            terms.append(self._hard * self._task(outputs, batch))
        for weights, compare in ((self._hints, hint), (self._attention, attention_transfer)):
            terms += [weight * compare(of_student[name], of_teacher[name]) for name, weight in weights.items()]
        if not terms:
            raise ValueError(
                "every weight of the distillation is 0: write soft=, hard=, hints= or attention= with another"
            )
        return torch.stack([_at_least_float32(term) for term in terms]).sum()

    def identity(self) -> dict[str, Any]:
        """The settings, as a checkpoint remembers them."""
        settings = {"temperature": self._temperature, "soft": self._soft, "hard": self._hard}
        return {**settings, "hints": self._hints, "attention": self._attention}


def _at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it has half precision, whose sums would lose too much."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _cross_entropy_of(outputs: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(logits_of(outputs), _labelled(batch)[1])


def _labelled(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise TypeError(
        f"cross-entropy needs batches of (inputs, labels), not a {type(batch).__name__}: write a loss of your "
        "own, a function (model, batch) -> scalar tensor, or give teacher= to learn without labels"
    )


@contextmanager
def _features(model: nn.Module, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named layers in the block; functions in place that follow them change a copy."""
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    if not names <= modules.keys():
        missing = ", ".join(map(repr, sorted(names - modules.keys())))
        raise ValueError(
            f"{type(model).__name__} has no layer {missing}: hints and attention take names of layers"
        )

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {name!r} gives a {type(output).__name__}: features have to be tensors")
            outputs[name] = output
            return output.clone()

        return hook

    if not names:
        yield outputs
        return
    # The fused path of encoders calls no hook; a function mode, which keeps it away, costs time at every function.
    with Unfused(), hooked(after=[(modules[name], keep(name)) for name in names]):
        yield outputs
