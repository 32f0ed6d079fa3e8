"""Optional Python packages: check that a command has those that it needs, and name the command that installs them."""

from importlib.util import find_spec

from mpa.files.records import InputError


def require(purpose: str, group: str, *packages: str) -> None:
    """Raise InputError if one of these packages, listed in requirements/`group`.txt, is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InputError(f"{purpose} needs {', '.join(missing)}. Install with: bash scripts/setup.sh {group}")
