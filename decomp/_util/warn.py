"""Warnings that point at the line of the user's program."""

import sys
import warnings

OURS = ("decomp", "layers", "contextlib")  # decorators of the standard library stand between our functions


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the innermost line of the stack that is outside of this library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
