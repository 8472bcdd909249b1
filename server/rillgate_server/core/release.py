"""Which release of a package this process runs. Does not know what follows from it."""

from importlib.metadata import PackageNotFoundError, version


def release_of(package: str) -> str:
    """Return its version; `unknown` when it runs from a source tree that was never installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
