"""Rank rules: ``decomp.tucker(model, ranks=decomp.ranks.energy(0.9))``."""

from decomp.ranks.request import Fixed, RankRequest, RankSpec, parse_request, parse_spec
from decomp.ranks.rules import Rule, energy, macs, params, vbmf

RULES: dict[str, Rule] = {"vbmf": vbmf()}

__all__ = [
    "RULES",
    "Fixed",
    "RankRequest",
    "RankSpec",
    "Rule",
    "energy",
    "macs",
    "params",
    "parse_request",
    "parse_spec",
    "vbmf",
]
