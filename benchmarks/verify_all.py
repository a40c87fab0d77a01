"""Run `deltadiff verify` in full and keep every check in results/verify-<device>.json.

python benchmarks/verify_all.py [DEVICE]
"""

import sys
from pathlib import Path

from deltadiff.bench.records import write
from deltadiff.devices import find_device
from deltadiff.verify.run import run
from deltadiff.verify.tolerance import format_table

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    device = find_device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    rows, ok = run(device)
    print(format_table(rows))
    for path in write([row.as_dict() for row in rows], RESULTS, device, "verify"):
        print(f"written: {path}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
