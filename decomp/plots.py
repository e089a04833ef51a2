"""Figures of plans: :func:`spectrum`, :func:`costs`, :func:`errors`; they need matplotlib."""

from decomp.analysis.plots import before_and_after, costs, errors, spectrum, tradeoffs

__all__ = ["before_and_after", "costs", "errors", "spectrum", "tradeoffs"]
