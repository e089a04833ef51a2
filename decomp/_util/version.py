"""The version of the package, as ``pyproject.toml`` states it and the installation remembers it."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version that is installed; "unknown" where a source tree is imported that was never installed."""
    try:
        return version("decomp")
    except PackageNotFoundError:
        return "unknown"
