"""Run the kernels under tools that find wrong accesses to memory, and count what they find.

python benchmarks/sanitizers.py cpu     csrc, built with AddressSanitizer and UBSan
python benchmarks/sanitizers.py cuda    the kernels of a GPU, under compute-sanitizer's four tools

Each writes its rows to results/checks-<device>.json and prints what was found; it exits with 1 if
that is anything. The calls are those of tests/support/sanitizer_suite.py.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the suite, the rows

import tally

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "lora_linear"
SUITE = ROOT / "tests" / "support" / "sanitizer_suite.py"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
ALL = ("--print-limit", "1000000")  # reports; the default stops at 100
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
HAZARDS = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warning")
REPORT = re.compile(r"^=+ +\w+: (?=Potential \w+ hazard detected)", re.MULTILINE)
RACE = re.compile(r"^=+ +\w+: Race reported between ", re.MULTILINE)  # some hazards, summed up
KIND = re.compile(r"Potential (\w+) hazard")
ACCESS = re.compile(r"=+ +(Write|Read) Thread \((\d+),.*? at (\w+)\+\w+ in (\S+)")


class Hazard(NamedTuple):
    """A report of racecheck: RAW or WAR, in which kernel, and the thread and place of both."""

    kind: str
    kernel: str
    writer: int
    write: str
    reader: int
    read: str

    def __str__(self) -> str:
        return f"{self.kind} {self.kernel}: written at {self.write}, read at {self.read}"


def hazard_of(report: str) -> Hazard | str:
    """The hazard of a report; the report itself, if it is none between a read and a write."""
    kind, accesses = KIND.search(report), {how: rest for how, *rest in ACCESS.findall(report)}
    if kind is None or accesses.keys() != {"Write", "Read"}:
        return report[:600]
    (writer, kernel, write), (reader, _, read) = accesses["Write"], accesses["Read"]
    return Hazard(kind[1], kernel, int(writer), write, int(reader), read)


def main(device: str) -> int:
    rows = list(on_cpu() if device == "cpu" else on_gpu())
    for path in tally.write(rows, seed=0):
        print(f"written: {path}")
    return int(any(row["failures"] for row in rows))


def run(command: list[str], **env: str) -> tuple[int, str]:
    """The exit code of a command, and all that it printed."""
    done = subprocess.run(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def row_of(tool: str, path: str, output: str, found: int, explained: int = 0) -> dict:
    """The row of a run of the suite, which is printed where something was found.

    ``explained``: reports beside the findings that `explains` knows to be none.
    """
    calls = re.search(r"^calls: (\d+)", output, re.MULTILINE)
    found += not calls  # it did not come to its end
    if found:
        print(output[-6000:])
    row = tally.row("sanitizers", tool, int(calls[1]) if calls else 0, found, path)
    print(f"{tally.describe(row)}, {explained} reports are explained", flush=True)
    return {**row, "explained": explained}


# ------------------------------------------------------------------ reports that are no findings


def explains(hazard: Hazard | str) -> bool:
    """Whether a hazard that racecheck reports is one of two that are none.

    Both are in the sm_90 kernel, whose threads hand over a few bytes of shared memory:

    - the number of a work item. All lanes of the loading warp store it, then one arrives at a
      barrier on which the readers wait; one of the readers arrives at another before it is stored
      anew. racecheck takes an arrival for that lane's alone, but a synchronisation of the warp, or
      of the readers, stands before it, so it comes after the stores, or the loads, of all;
    - what the warps run, which Triton's `warp_specialize` sends from the warps that multiply to the
      others. A barrier of all threads of the block stands between the store and its loads, and
      another one before the next store.

    tests/kernels/test_hopper_order.py proves all of these orders from the compiled code.
    """
    if isinstance(hazard, str) or hazard.kind not in ("RAW", "WAR"):
        return False
    if "lora_linear_hopper_kernel" not in hazard.kernel:
        return False
    write, read = source(hazard.write), source(hazard.read)
    if any("pipe.work.index(i).store(" in line for line in write):
        loads = "pipe.work.index(", ".load(one)"
        waits = ("mbarrier.wait(self.ready.index(i)",)  # in `Pipeline.wait_ready`
        return any(all(word in line for word in words) for words in (loads, waits) for line in read)
    multiplies = range(8 * 32)  # hopper.NUM_WARPS warps
    sends = hazard.writer in multiplies and hazard.reader not in multiplies
    hands_over = ("def _lora_linear_hopper_kernel", "gl.warp_specialize([")
    return sends and all(
        any(word in line for word in hands_over for line in at) for at in (write, read)
    )


def source(place: str) -> list[str]:
    """The source that FILE:LINE may mean, two lines of each file that comes into question.

    Triton gives the lines of `consume` the name of the file of the kernel that it is a part of, and
    a load the line of the wait before it.
    """
    name, _, line = place.partition(":")
    files = [name, *(["consumer.py"] if name == "hopper.py" else [])]
    texts = [(KERNELS / file).read_text().splitlines() for file in files]
    return ["\n".join(text[int(line) - 1 : int(line) + 1]) for text in texts]


def count_hazards(output: str) -> tuple[int, int]:
    """How many hazards racecheck reports that are findings, and how many `explains` explains.

    Its summary counts what it prints: each hazard, and each race that it sums hazards up to.
    """
    summary = HAZARDS.search(output)
    printed = sum(map(int, summary.groups())) if summary else 1
    hazards = [hazard_of(report) for report in REPORT.split(output)[1:]]
    others = Counter(str(hazard) for hazard in hazards if not explains(hazard))
    for text, count in others.most_common(20):
        print(f"{count} x {text}")
    explained = len(hazards) - others.total()
    return printed - len(RACE.findall(output)) - explained, explained


# ------------------------------------------------------------------ the runs


def on_gpu() -> Iterator[dict]:
    # Compiling is not what shall be watched, and takes many times as long under a tool.
    code, output = run([sys.executable, str(SUITE), "cuda"])
    if code:
        raise SystemExit(f"the suite fails without a tool:\n{output[-4000:]}")
    # A block of memory of its own for each tensor: the tool then knows where each one ends.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    suite = [sys.executable, str(SUITE), "cuda"]
    for tool in ("memcheck", "initcheck", "synccheck"):
        _, output = run(["compute-sanitizer", "--tool", tool, *suite], **apart)
        summary = SUMMARY.search(output)
        yield row_of(tool, "triton-cuda", output, int(summary[1]) if summary else 1)
    options = ("--tool", "racecheck", "--racecheck-report", "all", *ALL)
    _, output = run(["compute-sanitizer", *options, *suite], **apart)
    yield row_of("racecheck", "triton-cuda", output, *count_hazards(output))


def on_cpu() -> Iterator[dict]:
    """csrc in each of its instruction sets that this CPU has."""
    built = ROOT / "build" / "sanitizers"
    code, output = run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(built / "temporary"),
         "--build-lib", str(built / "lib")],
        CFLAGS=FLAGS, CXXFLAGS=FLAGS, LDFLAGS="-fsanitize=address,undefined",
    )  # fmt: skip
    if code or not list(built.glob("lib/deltadiff/_C.*.so")):
        raise SystemExit(f"csrc was not built with the sanitizers:\n{output[-4000:]}")
    compiler = os.environ.get("CXX", "c++")
    names = ("libasan.so", "libubsan.so")
    libraries = [run([compiler, f"-print-file-name={name}"])[1].strip() for name in names]
    for capability in ("default", "avx2", "avx512"):
        _, output = run(
            [sys.executable, str(SUITE), "cpu"],
            LD_PRELOAD=":".join(libraries), ASAN_OPTIONS="detect_leaks=0",
            PYTHONPATH=str(built / "lib"), ATEN_CPU_CAPABILITY=capability,
        )  # fmt: skip
        found = len(re.findall(r"ERROR: AddressSanitizer|runtime error:", output))
        yield row_of(f"AddressSanitizer, UBSan ({capability})", "cpp-cpu", output, found)


if __name__ == "__main__":
    if sys.argv[1:] not in (["cpu"], ["cuda"]):
        raise SystemExit(__doc__)
    if sys.argv[1] == "cuda" and shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer, a part of CUDA's toolkit, is not on the PATH")
    sys.exit(main(sys.argv[1]))
