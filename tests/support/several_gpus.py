"""What each method does under each way to train on several GPUs: as one process does, or refused.

`outcomes(way)` runs all of `METHODS` in two processes under one of `WAYS`, and in one process with
the same batches. A cell is "bit-equal", "equal to X" (the largest difference of any number), or
"refused: " with the words of the error that was raised before anything was trained.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import deepspeed_runs
import torch
import torch.distributed as dist
from accelerate_runs import make_accelerator
from fsdp_runs import F32, STEPS, make_base, make_model, parts_of, shard, train, values
from fsdp_runs import quantise_ as to_nf4_
from ranks import run_ranks
from tensor_parallel_runs import split_up
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from deltadiff import DeltaLoRA, FusedAdamW, export_peft, load_adapter, merge_, save_adapter, swap_
from deltadiff.diffora import Search
from deltadiff.errors import ArgumentError
from deltadiff.layers.flora import swap_flora_
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_
from deltadiff.optim.dylora import DyLoRA
from deltadiff.ranks import is_sharded, whole

LIMIT = 1e-5  # of a difference that is rounding; the parameters move by 3e-2


# ------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as the table has it.
        swap: puts pairs into a base model.
        optimizer: makes the optimizer of a model.
        result: what the trained model gives, as lists of numbers; it may use a folder, the same in
            all processes.
        dtype: of the model.
    """

    name: str
    swap: Callable
    optimizer: Callable
    result: Callable = lambda model, folder, device: values(model)
    dtype: torch.dtype = F32


def delta(**how):
    return functools.partial(DeltaLoRA, lr=5e-3, **how)


def swap_pairs(model):
    swap_(model, r=8, lora_alpha=16, seed=1)


def swap_lean(model):
    swap_(model.train(), r=8, lora_alpha=16, seed=1, lean=True)


def swap_over_nf4(model):
    """The bytes as bfloat16, for FSDP's mixed precision does not take others."""
    swap_pairs(to_nf4_(model, torch.bfloat16))


def pairs_of(model, folder, device):
    """What is trained. The bytes of a quantised weight are no numbers."""
    return [whole(p).flatten().tolist() for p in model.parameters() if p.requires_grad]


def logits(model, device):
    with torch.no_grad():
        return [model(input_ids=torch.arange(12, device=device)[None]).logits.flatten().tolist()]


def write_once(write, model, folder):
    """By all processes for a sharded model, of which the first one writes; else by the first."""
    if not dist.is_initialized():
        write(model, folder)
        return
    if any(map(is_sharded, model.parameters())) or dist.get_rank() == 0:
        write(model, folder)
    dist.barrier()


def save_and_load(model, folder, device):
    write_once(save_adapter, model, folder / "adapter")
    fresh = make_model().to(device)
    load_adapter(fresh, folder / "adapter")
    return logits(fresh, device)


def export_and_load(model, folder, device):
    import peft

    write_once(export_peft, model, folder / "exported")
    base = make_base(F32).to(device)
    return logits(peft.PeftModel.from_pretrained(base, folder / "exported"), device)


def merge_and_look(model, folder, device):
    merge_(model)
    return values(model)


ADALORA = {"total_step": STEPS, "target_r": 4, "tinit": 1, "tfinal": 1}
FLORA = functools.partial(FusedAdamW, lr=5e-3)
FACTORED = delta(w_update="factored")
METHODS = [
    Method("LoRA", swap_pairs, delta(update_ratio=0.0)),
    Method("LoRA, lean blocks", swap_lean, delta(update_ratio=0.0)),
    Method("LoRA over NF4", swap_over_nf4, delta(update_ratio=0.0), pairs_of),
    Method("Delta-LoRA in place, float32", swap_pairs, delta()),
    *(
        Method(f"Delta-LoRA in place, {how}", swap_pairs, delta(rounding=how), dtype=torch.bfloat16)
        for how in ("remainder", "stochastic", "nearest")
    ),
    Method("Delta-LoRA factored", swap_pairs, FACTORED),
    Method(
        "AdaLoRA", lambda model: swap_adalora_(model, init_r=8, seed=1),
        functools.partial(AdaLoRA, lr=5e-3, **ADALORA),
    ),
    Method("DyLoRA", swap_pairs, functools.partial(DyLoRA, lr=5e-3)),
    Method("FLoRA", lambda model: swap_flora_(model, r=8, seed=1), FLORA),
    Method("`save_adapter`, factored", swap_pairs, FACTORED, save_and_load),
    Method("`export_peft`, factored", swap_pairs, FACTORED, export_and_load),
    Method("`merge_`, factored", swap_pairs, FACTORED, merge_and_look),
]  # fmt: skip
SEARCH = "DiffoRA's search"
ROWS = [*(method.name for method in METHODS), SEARCH]


def search(model, rank=None, device="cpu", way="DDP"):
    """What a search has trained, and its gates."""
    state = Search(model, r=2, lr=1e-2, seed=0)
    if way == "FSDP2":
        shard(model)

    def loss(step):
        ids = (parts_of(step, 2)[rank] if rank is not None else parts_of(step, 1)[0]).to(device)
        return model(input_ids=ids, labels=ids).loss

    for t in range(0, STEPS, 2):
        state.inner_step(functools.partial(loss, t))
        state.gate_step(functools.partial(loss, t + 1))
    gates = [layer.gate.flatten().tolist() for layer in state.layers.values()]
    return [whole(p).flatten().tolist() for p in state.trained.values()] + gates


# ---------------------------------------------------------------------------------- ways


def by_ddp(method, model, rank, device):
    parallel = DistributedDataParallel(model)
    train(parallel, method.optimizer(parallel), rank, device=device)
    return model


def by_fsdp2(method, model, rank, device, **options):
    shard(model, **options)
    train(model, method.optimizer(model), rank, device=device)
    return model


def by_fsdp2_offloaded(method, model, rank, device):
    policy = CPUOffloadPolicy(pin_memory=device != "cpu")
    return by_fsdp2(method, model.cpu(), rank, device, offload_policy=policy)


def by_accelerate(method, model, rank, device):
    accelerator = make_accelerator("FSDP2")
    model, optimizer = accelerator.prepare(model, method.optimizer(model))
    train(model, optimizer, rank, device=device)
    return model


def by_trainer(method, model, rank, device):
    """Trainer with FSDP2; in one process Trainer alone, which accumulates the parts of a batch."""
    import trainer_runs
    from accelerate_runs import allow_fsdp_on_cpu
    from transformers import Trainer

    options = {"use_cpu": device == "cpu", "save_strategy": "no", "logging_strategy": "no"}
    options |= {"per_device_train_batch_size": 2}
    if rank is None:
        options |= {"gradient_accumulation_steps": 2}
    else:
        allow_fsdp_on_cpu()
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}

    class OwnOptimizer(Trainer):
        def create_optimizer(self, *args):
            self.optimizer = method.optimizer(self.model)
            return self.optimizer

    with TemporaryDirectory() as folder:
        trainer = trainer_runs.trainer_of(model, None, folder, STEPS, kind=OwnOptimizer, **options)
        trainer.train()
    return trainer.model


def by_zero(method, model, rank, device, stage):
    engine = deepspeed_runs.make_engine(model, method.optimizer(model), stage)
    deepspeed_runs.train_engine(engine, rank, device=device)
    return engine


def alone(method, model, device):
    optimizer = method.optimizer(model)
    train(model, optimizer, device=device)
    return model


ZERO = {f"ZeRO-{stage}": functools.partial(by_zero, stage=stage) for stage in (1, 2, 3)}
TENSOR_PARALLEL = "tensor parallelism"
WAYS = {
    "DDP": by_ddp,
    "FSDP2": by_fsdp2,
    "FSDP2, CPU offload": by_fsdp2_offloaded,
    "Accelerate, FSDP2": by_accelerate,
    "Trainer, FSDP2": by_trainer,
    **ZERO,
    TENSOR_PARALLEL: by_ddp,
}
OF_SEARCHES = ("DDP", "FSDP2", TENSOR_PARALLEL)  # a search has a loop and optimizers of its own


# --------------------------------------------------------------------------------- cells


def in_rank(rank, way, rows, device):
    """For each row what it gives under ``way``, or the words that refuse it."""
    if device != "cpu":
        device = f"{device}:{rank}"
    found = {}
    for row in rows:
        with _folder() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[row] = _run(way, row, rank, device, folder)
            except ArgumentError as error:
                found[row] = f"refused: {_reason(error)}"
            dist.barrier()
    return found


def _reason(error):
    """What an error says of what was given, in short and without the names of layers."""
    given = re.sub(r"^.*which names \S+: |^model\.\S+, which ", "", error.given)
    return given.split(": ")[0]


def _run(way, row, rank, device, folder):
    method = _method(row)
    base = make_base(F32 if method is None else method.dtype).to(device)
    if way == TENSOR_PARALLEL:
        base = split_up(base)
        put = swap_ if method else Search
        put(base, r=2, target_modules=["up_proj"])  # a layer that is split
    if method is None:
        return search(base, rank, device, way)
    method.swap(base)
    trained = WAYS[way](method, base, rank, device)
    if way in ZERO:
        return deepspeed_runs.result_in(trained, lambda model: method.result(model, folder, device))
    return method.result(trained, folder, device)


@functools.cache
def in_one(way, row, device):
    """What one process gives with the same batches."""
    method = _method(row)
    model = make_base(F32 if method is None else method.dtype).to(device)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method is None:
            return search(model, device=device)
        method.swap(model)
        own = way.startswith("Trainer")
        model = by_trainer(method, model, None, device) if own else alone(method, model, device)
        return method.result(model, Path(folder), device)


def _method(row):
    return next((method for method in METHODS if method.name == row), None)


@contextlib.contextmanager
def _folder():
    """A folder that all processes share, while all of them are in it."""
    with TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names)
        yield Path(names[0])
        dist.barrier()


def compare(found, expected):
    """ "bit-equal" or "equal to X"; raises where it is neither."""
    if found == expected:
        return "bit-equal"
    pairs = zip(found, expected, strict=True)
    differences = [abs(a - b) for ours, one in pairs for a, b in zip(ours, one, strict=True)]
    if not all(d <= LIMIT for d in differences):
        raise AssertionError(f"it differs by {max(differences):.1e} from one process")
    return f"equal to {max(differences):.0e}"


def outcomes(way, rows=None, device="cpu"):
    """The cells of a column by row.

    Raises:
        AssertionError: processes that differ, another result than that of one process, or an error
            that is not one of deltadiff's own refusals.
    """
    rows = [row for row in rows or ROWS if row != SEARCH or way in OF_SEARCHES]
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    first, second = run_ranks(in_rank, way, rows, device, backend=backend)
    cells = {}
    for row in rows:
        if first[row] != second[row]:
            raise AssertionError(f"{row} under {way}: the processes differ")
        if isinstance(first[row], str):
            cells[row] = first[row]
            continue
        try:
            cells[row] = compare(first[row], in_one(_reference(way), row, device))
        except AssertionError as error:
            raise AssertionError(f"{row} under {way}: {error}") from None
    return cells


def _reference(way):
    return "Trainer" if way.startswith("Trainer") else "alone"
