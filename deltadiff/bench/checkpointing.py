"""Gradient checkpointing in `deltadiff bench model`, also with what it keeps in the host's memory.

A checkpointed layer keeps its input alone: tokens x hidden numbers a layer, which are most of what
a long step keeps. Two libraries move them to the host in the forward pass and back in the backward
pass: transformers (``activation_checkpointing_enable(offload=True)``) on the stream of the
computation, and TRL (``activation_offloading=True`` of its trainers) on a stream beside it.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from ..checks import need_package
from ..errors import ArgumentError
from .clocks import Call

OFFLOADING = ("transformers", "trl")


def check_offload(model: nn.Module, device: torch.device, offload: str | None) -> None:
    """Raise ArgumentError where the library of ``offload`` cannot offload here."""
    if offload is None:
        return
    if device.type != "cuda":
        given = f"{offload} on {device.type}, whose memory is the host's"
        raise ArgumentError("--offload", given, "a GPU")
    if offload == "trl":
        need_package("trl", extra="finetune", argument="--offload")
        return
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        accepted = "a transformers whose activation_checkpointing_enable has offload"
        raise ArgumentError("--offload", "transformers, of an older version", accepted)


@contextmanager
def checkpointing_of(
    model: nn.Module, on: bool, offload: str | None
) -> Iterator[AbstractContextManager | None]:
    """Gradient checkpointing of all layers in a model of transformers, where ``on``.

    It yields a context for each step, or None where a step needs none.
    """
    if not on:
        yield None
        return
    more = {"offload": True} if offload == "transformers" else {}
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}, **more
    )
    try:
        if offload == "trl":
            from trl.models.activation_offloading import get_act_offloading_ctx_manager

            yield get_act_offloading_ctx_manager(model)
        else:
            yield None
    finally:
        model.gradient_checkpointing_disable()


def within(around: AbstractContextManager | None, step: Call) -> Call:
    """``step`` in a context, where there is one."""
    if around is None:
        return step

    def run() -> None:
        with around:
            step()

    return run
