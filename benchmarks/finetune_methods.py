"""Fine-tune one model on one text with each method and seed; records in results/finetune-*.json.

    python benchmarks/finetune_methods.py MODEL DATA [--seeds 3] [--jobs 1] [OPTIONS of finetune]

Each run is a `deltadiff finetune` of its own process. With several jobs at a time the figures of
speed mean nothing and are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from deltadiff.measure import write

RESULTS = Path(__file__).parent / "results"

METHODS = {
    "LoRA, PEFT eager": ["--eager"],
    "LoRA": ["--method", "lora"],
    "Delta-LoRA, in place, remainder": ["--rounding", "remainder"],
    "Delta-LoRA, in place, stochastic": ["--rounding", "stochastic"],
    "Delta-LoRA, in place, nearest": ["--rounding", "nearest"],
    "Delta-LoRA, factored": ["--w-update", "factored"],
}


def run(words: list[str], method: str, seed: int) -> dict:
    """One fine-tuning; returns its result.json."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        command = [sys.executable, "-m", "deltadiff", "finetune", *words, *METHODS[method]]
        command += ["--seed", str(seed), "--output", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
        return json.loads((output / "result.json").read_text())


def flat(result: dict, method: str, seed: int, alone: bool) -> dict:
    """The record of a run."""
    settings, update = result["settings"], result["weight_update"] or {}
    found = {"op": "finetune", "method": method, "seed": seed}
    names = ("model", "data", "r", "alpha", "update_ratio", "start_step", "lr", "steps", "dtype")
    found |= {name: settings[name] for name in (*names, "batch_size", "target_modules")}
    for when in ("before", "after"):
        found |= {f"{name}_{when}": value for name, value in result[when].items()}
    found |= {"share": update.get("share"), "update_size": update.get("size")}
    found["trainable"] = result["trainable_parameters"]
    if alone:
        found |= {name: result[name] for name in ("seconds_per_step", "tokens_per_second")}
        found["peak_mib"] = result["peak_memory_mib"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args, options = parser.parse_known_args()
    words = [args.model, args.data, *options]

    def one(case: tuple[str, int]) -> dict:
        found = flat(run(words, *case), *case, alone=args.jobs == 1)
        shown = {k: v for k, v in found.items() if k.endswith(("_before", "_after", "share"))}
        print(*case, *(f"{k} {v:.4g}" for k, v in shown.items() if v is not None), flush=True)
        return found

    cases = [(method, seed) for method in METHODS for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(one, cases))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for path in write(found, RESULTS, device):
        print(f"written: {path}")


if __name__ == "__main__":
    main()
