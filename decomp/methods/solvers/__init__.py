"""Solvers for what has no closed form: CP by accelerated alternating least squares, with bounded terms."""

from decomp.methods.solvers.cp import CP, fit_cp

__all__ = ["CP", "fit_cp"]
