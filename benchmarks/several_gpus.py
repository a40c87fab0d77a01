"""What works on several GPUs: each method under each way to train in two processes.

python benchmarks/several_gpus.py          two processes on the CPU, by gloo
python benchmarks/several_gpus.py cuda     two GPUs, by NCCL

It writes results/several-gpus-cpu.json, or that of the GPU, and prints the cells. Each cell is run,
and compared with one process that sees the same batches; tests/support/several_gpus.py says how. A
cell that is neither equal nor refused ends the script with an error. It needs DeepSpeed, which runs
on a CPU too (`DS_BUILD_OPS=0 pip install deepspeed`).
"""

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from deltadiff.files import slug, write_records
from deltadiff.text import align_columns

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the runs

from several_gpus import ROWS, WAYS, outcomes

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "transformers", "accelerate", "deepspeed", "peft")


def main(argv: Sequence[str]) -> None:
    device = argv[0] if argv else "cpu"
    versions = {name: metadata.version(name) for name in VERSIONS}
    columns = {way: outcomes(way, device=device) for way in WAYS}
    gpu = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    records = [
        {"op": "several_gpus", "device": gpu, "method": row, "outcomes": cells, **versions}
        for row, cells in ((row, {way: columns[way].get(row) for way in WAYS}) for row in ROWS)
    ]
    path = RESULTS / f"several-gpus-{slug(gpu)}.json"
    write_records(path, records)
    print(align_columns([(r["method"], *map(str, r["outcomes"].values())) for r in records]))
    print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
