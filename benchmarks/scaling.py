"""Training steps on several GPUs under DDP and FSDP2, beside one GPU: time, tokens/s and memory.

torchrun --nproc-per-node 2 benchmarks/scaling.py [--output FOLDER] [--models NAME ...]

Each process has its own batch, and a step is as slow as its slowest process. "one GPU" is the same
step of a process by itself; all processes take it at once, so that what they share (the host, its
memory, the power) is the same. The records go to FOLDER/scaling-<gpu>.json (default: results).
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltadiff import DeltaLoRA, swap_
from deltadiff.bench.clocks import sample, time_steps
from deltadiff.bench.models import LLAMA_8B, LLAMA_70B, LLAMA_SMALL, ModelShape, build_model
from deltadiff.bench.records import OUT_OF_MEMORY, write
from deltadiff.devices import free_memory

RESULTS = Path(__file__).parent / "results"
WAYS = ("FSDP2", "DDP", "one GPU")
R, WARM_UP = 16, 3


class Run(NamedTuple):
    """What is trained: a model, how, and on which batch of each process."""

    shape: ModelShape
    method: str
    options: dict  # of DeltaLoRA
    batch: int
    sequence: int
    checkpointing: bool
    steps: int


LORA = ("LoRA", {"update_ratio": 0.0})
RUNS = [
    Run(LLAMA_8B, *LORA, 8, 1024, False, 10),
    Run(LLAMA_8B, "Delta-LoRA in place, remainder", {"rounding": "remainder"}, 8, 1024, False, 10),
    # Its weights alone take more than one GPU has.
    Run(LLAMA_70B, *LORA, 2, 1024, True, 3),
    Run(LLAMA_70B, "Delta-LoRA in place, stochastic", {"rounding": "stochastic"}, 2, 1024, True, 3),
    Run(LLAMA_SMALL, *LORA, 2, 32, False, 5),  # for a CPU
    Run(LLAMA_SMALL, "Delta-LoRA in place, remainder", {"rounding": "remainder"}, 2, 32, False, 5),
]


def main(argv: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    names = [run.shape.name for run in RUNS if (run.shape is LLAMA_SMALL) != on_gpu]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--models", nargs="+", default=names, choices=[r.shape.name for r in RUNS])
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    records = []
    for run in RUNS:
        if run.shape.name in args.models:
            for r in measure(run, device):
                records.append(r)
                if dist.get_rank() == 0:  # after every one: an interrupted run keeps what it has
                    write(records, args.output, device)
                    print(in_words(r), flush=True)
    dist.destroy_process_group()


def in_words(r: dict) -> str:
    head = f"{r['model']}, {r['method']}, {r['way']}, {r['gpus']} GPUs: "
    if r["note"]:
        return head + r["note"]
    text = f"{r['p50_ms']:.1f} ms, {r['tokens_per_s']:,.0f} tokens/s"
    return head + text + ("" if r["peak_mib"] is None else f", {r['peak_mib'] / 1024:.1f} GiB")


# ------------------------------------------------------------------ the records of a run


def measure(run: Run, device: torch.device) -> Iterator[dict]:
    """The records of a run, one for each way."""
    size = dist.get_world_size()
    for way in WAYS:
        seconds, peak, sizes, note = None, None, {}, None
        try:
            seconds, peak, sizes = timed(run, way, device)
        except torch.OutOfMemoryError as error:
            note = OUT_OF_MEMORY
            print(f"{run.shape.name}, {way}: {error}", file=sys.stderr, flush=True)
        free_memory(device)
        gpus = 1 if way == "one GPU" else size
        tokens = gpus * run.batch * run.sequence
        yield {
            "op": "scaling", "model": run.shape.name, "method": run.method, "way": way,
            "gpus": gpus, "batch": run.batch, "sequence": run.sequence, "r": R,
            "checkpointing": run.checkpointing, **sizes,
            "p50_ms": seconds and round(seconds * 1e3, 3),
            "tokens_per_s": seconds and round(tokens / seconds, 1),
            "peak_mib": peak and round(peak, 1), "note": note,
        }  # fmt: skip


def timed(run: Run, way: str, device: torch.device) -> tuple[float, float | None, dict]:
    """The seconds of a step, the MiB at its peak, and the bytes of W and of the adapters."""
    model = built(run, way, device)
    sizes = {
        "frozen_bytes": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "adapter_bytes": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "lora_A_bytes": sum(p.nbytes for n, p in model.named_parameters() if "lora_A" in n),
    }
    optimizer = DeltaLoRA(model, lr=1e-4, **run.options)
    called = model
    if way == "DDP":
        called = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(model.config.vocab_size, (run.batch, run.sequence), device=device)

    def step() -> None:
        called(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def of_slowest(step: Callable[[], object]) -> float:
        dist.barrier()
        took = torch.tensor(sample(step, 1, device, flush=False), device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item()

    seconds, peak = time_steps(step, run.steps, device, WARM_UP, of_slowest)
    return statistics.median(seconds), peak, sizes


def built(run: Run, way: str, device: torch.device) -> nn.Module:
    """The model with its adapters and random weights.

    It is made a block at a time, each sharded before the next is made, for all of it may be more
    than one GPU holds.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(run.shape, dtype, torch.device("meta"))
    for layer in model.model.layers:
        swap_(filled(layer, device), r=R, lora_alpha=2 * R)
        if way == "FSDP2":
            fully_shard(layer)
    with device:  # its buffers are computed when it is made
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        filled(module, device)
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return fully_shard(model) if way == "FSDP2" else model


@torch.no_grad()
def filled(module: nn.Module, device: torch.device) -> nn.Module:
    """A module that was on the meta device, on ``device``, with random numbers, norms of 1."""
    for p in module.to_empty(device=device).parameters():
        p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
    return module


if __name__ == "__main__":
    main(sys.argv[1:])
