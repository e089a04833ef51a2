"""Figures of plans: :func:`spectrum`, :func:`costs`, :func:`errors`, :func:`sensitivity`; they need matplotlib."""

from decomp.analysis.plots import before_and_after, costs, errors, sensitivity, spectrum, tradeoffs

__all__ = ["before_and_after", "costs", "errors", "sensitivity", "spectrum", "tradeoffs"]
