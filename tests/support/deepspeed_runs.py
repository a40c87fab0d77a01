"""Runs of fsdp_runs' models under DeepSpeed's ZeRO, and what it does to an optimizer's groups."""

import os
import tempfile
from argparse import Namespace

import torch
import torch.distributed as dist
from fsdp_runs import METHODS, STEPS, make_model, make_peft_model, parts_of, values

from deltadiff import DeltaLoRA
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.low_rank_sum import low_rank_sum


def make_engine(model, optimizer, stage, **config):
    """DeepSpeed's engine of a model and its optimizer."""
    import deepspeed

    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    halved = next(model.parameters()).dtype is torch.bfloat16
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": halved},
        **config,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train_engine(engine, rank, steps=range(STEPS), device="cpu"):
    for t in steps:
        ids = parts_of(t, dist.get_world_size())[rank].to(device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def train_by_accelerate(rank, stage, method):
    """All parameters after training under Accelerate's own integration of DeepSpeed."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({name: str(place) for name, place in places.items()})
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` sets it
    dtype, how = METHODS[method]
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = make_model(dtype)
    model, optimizer = accelerator.prepare(model, DeltaLoRA(model, lr=5e-3, **how))
    for t in range(STEPS):
        ids = parts_of(t, dist.get_world_size())[rank].to(accelerator.device)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    return result_in(model)


def result_in(engine, result=values):
    """``result`` of the model with whole parameters, which stage 3 has partitioned."""
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=engine.zero_optimization_stage() == 3):
        return result(engine.module)


def trained_values(model):
    """All parameters, and all that training added to each weight."""
    sums = [low_rank_sum(name, [layer]) for name, layer in lora_layers(model).items()]
    return values(model) + [(b @ a).flatten().tolist() for b, a in sums]


def train_by_zero(rank, stage, method, peft=False):
    """`trained_values` after some steps; and after the last two of them from a checkpoint, once in
    a new engine, and once in the engine that has done them.
    """
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
            found.append(result_in(engine, trained_values))
        engine.load_checkpoint(folders[0], tag="4")
        train_engine(engine, rank, range(4, STEPS))
        found.append(result_in(engine, trained_values))
        dist.barrier()
    return found


def logits_of(engine):
    with torch.no_grad():
        return engine(input_ids=parts_of(9, 1)[0][:2]).logits.flatten().tolist()


def save_universal(rank, folder, stage, method, peft=False):
    """Train in an engine, and leave a universal checkpoint of step 4 in ``folder``.

    Returns what the model of that step answers, and `trained_values` after the last step.
    """
    dtype, how = METHODS[method]
    model = (make_peft_model if peft else make_model)(dtype)
    engine = make_engine(model, DeltaLoRA(model, lr=5e-3, **how), stage)
    train_engine(engine, rank, range(4))
    engine.save_checkpoint(folder, tag="4")
    answer = logits_of(engine)
    train_engine(engine, rank, range(4, STEPS))
    dist.barrier()
    if rank == 0:
        from deepspeed.checkpoint.ds_to_universal import main

        main(Namespace(
            input_folder=f"{folder}/4", output_folder=f"{folder}/universal", strict=True,
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False,
            inject_missing_state=True,
        ))  # fmt: skip
    dist.barrier()
    return answer, result_in(engine, trained_values)


def load_universal(rank, folder, stage, method, peft=False, used=False):
    """What `save_universal` returns, of an engine that goes on from its checkpoint.

    ``used``: the engine has been trained before.
    """
    dtype, how = METHODS[method]
    model = (make_peft_model if peft else make_model)(dtype)
    optimizer = DeltaLoRA(model, lr=5e-3, **how)
    engine = make_engine(model, optimizer, stage, checkpoint={"load_universal": True})
    if used:
        train_engine(engine, rank, range(6, 8))
    engine.load_checkpoint(folder, tag="universal")
    answer = logits_of(engine)
    train_engine(engine, rank, range(4, STEPS))
    return answer, result_in(engine, trained_values)


def load_elastic(rank, stage):
    """Load an elastic checkpoint of an engine with a factored update."""
    model = make_model()
    zero = {"stage": stage, "elastic_checkpoint": True}
    engine = make_engine(
        model, DeltaLoRA(model, w_update="factored"), stage, zero_optimization=zero
    )
    train_engine(engine, rank, range(2))
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        engine.save_checkpoint(folders[0], tag="2")
        engine.load_checkpoint(folders[0], tag="2")


def flatten_groups(optimizer):
    """Put one vector into each group, as DeepSpeed does of the part that a process updates."""
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        group["params"] = [flat.requires_grad_()]


class Flattened:
    """An optimizer of one param group that trains as under ZeRO-1, in one process."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.params = optimizer.param_groups[0]["params"]
        flatten_groups(optimizer)

    @property
    def values(self):
        (vector,) = self.optimizer.param_groups[0]["params"]
        return vector.detach()

    def step(self):
        (vector,) = self.optimizer.param_groups[0]["params"]
        vector.grad = torch.cat([p.grad.flatten() for p in self.params])
        self.optimizer.step()
        self.put_back()

    def put_back(self):
        """Bring the values of the vector into the parameters, as no version counter sees it."""
        parts = self.values.split([p.numel() for p in self.params])
        for p, part in zip(self.params, parts, strict=True):
            p.data.copy_(part.view_as(p))

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def load_universal(self, vector, saved):
        """Do with the optimizer what DeepSpeed does when it loads a universal checkpoint.

        ``vector``: the values of the parameters; ``saved``: the optimizer's state.
        """
        optimizer, (group,) = self.optimizer, self.optimizer.param_groups
        group["params"][0].data.copy_(vector)
        (moments,), (theirs,) = saved["state"].values(), saved["param_groups"]
        optimizer.state[group["params"][0]] |= {
            name: moments[name].clone() for name in ("step", "exp_avg", "exp_avg_sq")
        }
        for name, value in theirs.items():
            if name != "params":
                group[name] = value
        self.put_back()
