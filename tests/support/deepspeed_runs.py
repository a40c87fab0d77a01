"""Runs of fsdp_runs' models under DeepSpeed's ZeRO, and what it does to an optimizer's groups."""

import tempfile

import torch
import torch.distributed as dist
from fsdp_runs import METHODS, STEPS, make_model, make_peft_model, parts_of, values

from deltadiff import DeltaLoRA


def make_engine(model, optimizer, stage):
    """DeepSpeed's engine of a model and its optimizer."""
    import deepspeed

    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    halved = next(model.parameters()).dtype is torch.bfloat16
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": halved},
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train_engine(engine, rank, steps=range(STEPS), device="cpu"):
    for t in steps:
        ids = parts_of(t, 2)[rank].to(device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def result_in(engine, result=values):
    """``result`` of the model with whole parameters, which stage 3 has partitioned."""
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=engine.zero_optimization_stage() == 3):
        return result(engine.module)


def train_by_zero(rank, stage, method, peft=False):
    """All parameters after some steps; and after the last two of them from a checkpoint."""
    dtype, how = METHODS[method]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        for resumes in (False, True):
            model = (make_peft_model if peft else make_model)(dtype)
            engine = make_engine(model, DeltaLoRA(model, lr=5e-3, **how), stage)
            if resumes:
                engine.load_checkpoint(folders[0], tag="4")
            else:
                train_engine(engine, rank, range(4))
                engine.save_checkpoint(folders[0], tag="4")
            train_engine(engine, rank, range(4, STEPS))
            found.append(result_in(engine))
        dist.barrier()
    return found


def flatten_groups(optimizer):
    """Put one vector into each group, as DeepSpeed does of the part that a process updates."""
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        group["params"] = [flat.requires_grad_()]
