"""Run `deltadiff verify` in full and keep every check in results/verify-<device>.json.

python benchmarks/verify_all.py [DEVICE]
"""

import sys
from pathlib import Path

from deltadiff import verify
from deltadiff.measure import write

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    device = verify.find_device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    rows, ok = verify.run(device)
    print(verify.format_table(rows))
    for path in write([row.as_dict() for row in rows], RESULTS, device, "verify"):
        print(f"written: {path}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
