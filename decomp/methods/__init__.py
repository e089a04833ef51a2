"""The decomposition methods: one file each, one row in the table."""

from decomp.methods.record import Analysis, Method, Ranks
from decomp.methods.svd import SVD
from decomp.methods.tucker import TUCKER

METHODS: dict[str, Method] = {method.name: method for method in (SVD, TUCKER)}

__all__ = ["METHODS", "Analysis", "Method", "Ranks"]
