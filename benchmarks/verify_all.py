"""Run `deltadiff verify` in full and keep every check in results/verify-<device>.json.

python benchmarks/verify_all.py [DEVICE]
"""

import sys

import record

from deltadiff import verify


def main() -> int:
    device = verify.find_device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    rows, ok = verify.run(device)
    print(verify.format_table(rows))
    for path in record.write([row.as_dict() for row in rows], device, stem="verify"):
        print(f"written: {path}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
