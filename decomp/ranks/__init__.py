"""Rank rules: ``decomp.tucker(model, ranks=decomp.ranks.energy(0.9))``."""

from decomp.ranks.bounds import error, macs, params
from decomp.ranks.request import Fixed, RankSpec, parse_request, parse_spec
from decomp.ranks.rule import Ranks, Rule
from decomp.ranks.spectral import SpectralRule, energy, gavish_donoho, mdl, stable_rank, vbmf

RULES: dict[str, Rule] = {
    "vbmf": vbmf(),
    "gavish_donoho": gavish_donoho(),
    "mdl": mdl(),
    "stable_rank": stable_rank(),
}

__all__ = [
    "RULES",
    "Fixed",
    "RankSpec",
    "Ranks",
    "Rule",
    "SpectralRule",
    "energy",
    "error",
    "gavish_donoho",
    "macs",
    "mdl",
    "params",
    "parse_request",
    "parse_spec",
    "stable_rank",
    "vbmf",
]
