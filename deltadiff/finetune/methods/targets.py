"""Which layers of a model `--target-modules` names."""

from typing import TYPE_CHECKING

from torch import nn

from ...errors import ArgumentError

if TYPE_CHECKING:
    from ..settings import Settings

# What models of Hugging Face call W_Q and W_V of attention.
QUERY_VALUE = (
    "query", "value", "query_proj", "value_proj", "q_proj", "v_proj", "q_lin", "v_lin",
    "attn.q", "attn.v",
)  # fmt: skip


def find_targets(settings: "Settings", module: nn.Module) -> str | list[str]:
    """The layers that get a low-rank pair, in the form that `swap_` and PEFT take.

    Raises:
        ArgumentError: "qv" was asked for, and the model has no layers of these names.
    """
    if settings.target_modules == "qv":
        return query_value(module)
    all_linear = settings.target_modules == "all-linear"
    return settings.target_modules if all_linear else settings.target_modules.split(",")


def query_value(module: nn.Module) -> list[str]:
    """Names of the linear layers that are W_Q and W_V of attention, which the papers tune.

    Raises:
        ArgumentError: no layer has a known name.
    """
    found = [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and name.endswith(tuple(f".{end}" for end in QUERY_VALUE))
    ]
    if not found:
        given = "qv, for a model whose attention has neither " + " nor ".join(QUERY_VALUE[::2])
        raise ArgumentError("target_modules", given, "the names of its layers")
    return found
