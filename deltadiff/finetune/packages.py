"""Packages: those that every training run needs, and where one is installed."""

import importlib.util
from pathlib import Path

from ..checks import need_package

PACKAGES = ("transformers", "tqdm", "matplotlib")


def check_packages() -> None:
    """Find out that a package is missing before the training, not after it.

    Raises:
        ArgumentError: one of `PACKAGES` cannot be imported; the message says how to install it.
    """
    for package in PACKAGES:
        need_package(package, "finetune")


def package_folder(name: str) -> Path | None:
    """The folder of an installed package, which is found without importing it."""
    name = name.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None
