"""benchmarks/tables.py: what it writes between the marks, and the pages that hold the tables."""

import importlib.util
import json
from pathlib import Path

import pytest
import tally

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def records(tables):
    return tables.load()


def test_only_what_is_between_the_marks_is_written(tables, records):
    parts = {"compare": tables.DOCUMENTS[tables.ALL]["compare"]}
    text = "before <!-- compare -->old<!-- end --> after"
    filled = tables.fill(text, parts, records)
    assert filled.startswith("before <!-- compare -->\n") and filled.endswith("<!-- end --> after")
    assert "old" not in filled and tables.fill(filled, parts, records) == filled
    assert tables.fill(text, parts, []) == text.replace("old", "not measured yet")
    assert tables.fill("no mark", parts, []) == "no mark"
    with pytest.raises(SystemExit, match="compare"):
        tables.fill("no mark", parts, records)


def test_comparisons_are_in_the_words_of_deltadiff_compare(tables, records):
    (path,) = tables.RESULTS.glob("compare-sst2-nvidia-h100-*.json")
    mine = json.loads(path.read_text())
    text = tables.compare_tables(mine)
    assert tables.markdown(mine) in text
    assert tables.caption(mine) in text


def test_checks_are_listed_with_what_failed(tables):
    row = tally.row("mutants", "settings.json", 1200, failures=1) | {"gpu": "a CPU"}
    text = tables.checks_table([row, row | {"op_suite": "verify", "worst_ratio": 0.25}])
    first, second = text.splitlines()[2:]
    assert first.endswith("| settings.json | cpu |  | 1,200 | 1 | 0.25 |")
    assert second.endswith("| settings.json | cpu |  | 1,200 | 1 |  |")


def test_checks_of_a_tool_are_no_records_of_it(tables):
    for name, (_, belongs) in tables.DOCUMENTS[tables.ALL].items():
        for op in ("compare", "scaling", "peft_call", "several_gpus", "families", "fp8_accuracy"):
            row = tally.row("kills", op, 20) | {"gpu": "a CPU"}
            assert belongs(row) == (name == "checks"), (name, op)


def test_every_plot_and_figure_is_linked_and_there(tables):
    for document in tables.DOCUMENTS:
        text = document.read_text()
        links = [
            line[line.index("](") + 2 : -1] for line in text.splitlines() if line.startswith("![")
        ]
        assert links or "not measured yet" in text
        assert all((document.parent / link).is_file() for link in links)


def test_the_table_of_the_front_page_is_short_and_of_one_machine(tables, records):
    write, belongs = tables.DOCUMENTS[tables.FRONT]["summary"]
    mine = [r for r in records if belongs(r)]
    assert {r["gpu"] for r in mine} == {tables.SUMMARY_GPU}
    lines = write(mine).splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert 5 <= len(rows) <= 10 and sum(line.startswith("![") for line in lines) == 2
    assert len(tables.FRONT.read_text().splitlines()) <= 250


def test_a_row_of_the_front_page_comes_from_its_records(tables):
    shape = {"M": 8192, "K": 4096, "N": 4096, "r": 16}
    fields = {"op": "lora_linear", "mode": "forward", "graph": False, "shape": shape, "gpu": "x"}
    fields["dtype"] = tables.SUMMARY_DTYPE

    def record(variant, p50_ms, over_floor, peak_mib=512.0):
        times = {"p50_ms": p50_ms, "over_floor": over_floor, "peak_mib": peak_mib, "note": None}
        return {**fields, "variant": variant, **times}

    frozen, ours = record("frozen", 2.0, 1.0), record("deltadiff", 2.5, 1.25, 1024.0)
    peft = record("peft-bf16", 5.0, 2.5, 2048.0)
    (row,) = (line for line in tables.summary([frozen, ours, peft]).splitlines() if "8192" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "a layer, forward", "8192x4096x4096 r16", "frozen 2.00", "**1.25**", "", "2.50", "", "",
        "1.00", "2.00",
    ]  # fmt: skip
    assert "8192" not in tables.summary([ours, peft])  # without a floor there is no row


def test_a_row_of_the_table_of_blocks_comes_from_its_records(tables):
    fields = {"op": "block", "block": "gated MLP", "mode": "forward+backward", "graph": True}
    fields |= {"dtype": "bfloat16", "shape": {"M": 8192, "K": 64, "N": 160, "r": 16}}

    def record(variant, over_floor, peak_mib):
        times = {"p50_ms": 2 * over_floor, "over_floor": over_floor, "note": None}
        return {**fields, "variant": variant, "peak_mib": peak_mib, **times}

    records = [record("frozen", 1.0, 1344.0), record("deltadiff", 1.04, 737.2)]
    head, _, row = tables.block_table(records).splitlines()
    assert head.endswith("| floor, ms | MiB | deltadiff | MiB |")
    case = "gated MLP bfloat16 forward+backward graph"
    assert row == f"| 8192x64x160 r16 | {case} | 2.000 | 1,344 | **1.04** | 737 |"
    failed = {**records[1], "over_floor": None, "peak_mib": None, "note": "out of memory"}
    row = tables.block_table([records[0], failed]).splitlines()[-1]
    assert row.endswith("| 2.000 | 1,344 | out of memory |  |")


def test_a_row_of_the_table_of_families_comes_from_its_record(tables):
    shares = {"experts": 0.8, "adapted": 0.15, "a convolution": 0.0496, "trained whole": 0.0004}
    record = {
        "model": "Tiny", "weights": 7_000_000, "layers": 9, "shares": shares,
        "peft_named": True, "peft_layers": 5, "fused": 3, "others": {"why": 2},
        "transformers": "1", "peft": "2",
    }  # fmt: skip
    text = tables.families_table([record])
    cells = "Tiny | 7 M | 9 | 15.0% | <0.1% | experts 80.0%, a convolution 5.0%"
    assert f"| {cells} | 3 of 5 (named); 2 not: why |" in text and "transformers 1, PEFT 2" in text


def test_check_says_what_is_not_up_to_date(tables, monkeypatch, capsys, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- verify -->old<!-- end -->")
    parts = {"verify": tables.DOCUMENTS[tables.ALL]["verify"]}
    monkeypatch.setattr(tables, "DOCUMENTS", {page: parts})
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "stale_plots", lambda *_: [])
    monkeypatch.setattr(tables, "write_plots", lambda *_: [])
    assert tables.main(["--check"]) == 1
    assert "not up to date: README.md" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
