"""Runs of fsdp_runs' models under Accelerate, with DDP or FSDP2."""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fsdp_runs import METHODS, make_model, make_peft_model

from deltadiff import DeltaLoRA

STATE_TYPES = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


def allow_fsdp_on_cpu():
    """Let Accelerate use FSDP in processes without a GPU, where it takes DDP whatever it is told.

    What it does then is the same on every device.
    """
    make = AcceleratorState.__init__
    if make.__name__ == "init":  # it is allowed already
        return

    def init(self, *args, fsdp_plugin=None, **options):
        make(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in vars(self):  # a later instance has the state of the first one
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def make_accelerator(parallel, **options):
    """``parallel``: "DDP" or "FSDP2"; ``options`` are those of FSDP's plugin."""
    if parallel == "DDP":
        return Accelerator(cpu=not torch.cuda.is_available())
    allow_fsdp_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )
    return Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)


def make_run(method, peft=False):
    """A swapped model and its optimizer."""
    dtype, how = METHODS[method]
    model = (make_peft_model if peft else make_model)(dtype)
    return model, DeltaLoRA(model, lr=5e-3, **how)
