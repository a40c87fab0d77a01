"""The packages that every training run needs."""

from ..checks import need_package

PACKAGES = ("transformers", "tqdm", "matplotlib")


def check_packages() -> None:
    """Find out that a package is missing before the training, not after it.

    Raises:
        ArgumentError: one of `PACKAGES` cannot be imported; the message says how to install it.
    """
    for package in PACKAGES:
        need_package(package, "finetune")
