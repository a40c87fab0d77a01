"""Runs of fsdp_runs' models under DeepSpeed's ZeRO, and what it does to an optimizer's groups."""

import tempfile

import torch
from fsdp_runs import METHODS, STEPS, make_model, make_peft_model, parts_of, values

from deltadiff import DeltaLoRA


def train_by_zero(rank, stage, method, peft=False):
    """All parameters after some steps; and after the last two of them from a checkpoint."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    dtype, how = METHODS[method]
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype is torch.bfloat16},
    }  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        torch.distributed.broadcast_object_list(folders)
        for resumes in (False, True):
            model = (make_peft_model if peft else make_model)(dtype)
            optimizer = DeltaLoRA(model, lr=5e-3, **how)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            if resumes:
                engine.load_checkpoint(folders[0], tag="4")
            for t in range(4 if resumes else 0, STEPS):
                ids = parts_of(t, 2)[rank]
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
                if t == 3:
                    engine.save_checkpoint(folders[0], tag="4")
            params = list(model.parameters())
            with deepspeed.zero.GatheredParameters(params, enabled=stage == 3):
                found.append(values(model))
        torch.distributed.barrier()
    return found


def flatten_groups(optimizer):
    """Put one vector into each group, as DeepSpeed does of the part that a process updates."""
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        group["params"] = [flat.requires_grad_()]
