"""Solvers without a closed form: CP by accelerated alternating least squares, and its error-preserving correction."""

from decomp.solvers.cp import CP, fit_cp

__all__ = ["CP", "fit_cp"]
