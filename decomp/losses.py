"""Losses for :func:`decomp.finetune`: the task's, a teacher's, and what they are made of."""

from decomp.training.losses import (
    Distillation,
    Loss,
    attention_transfer,
    cross_entropy,
    hint,
    logits_of,
    soft_targets,
)

__all__ = ["Distillation", "Loss", "attention_transfer", "cross_entropy", "hint", "logits_of", "soft_targets"]
