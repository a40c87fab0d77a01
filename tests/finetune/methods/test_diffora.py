"""DiffoRA's two stages: what is searched, selected and trained, and going on in either."""

import json

import pytest
from finetune_runs import finetune, stop_at, train_method

from deltadiff.diffora import rounds
from deltadiff.finetune import training

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")

D, F = 32, 64  # hidden and feed-forward size of the small BERT, which has 2 blocks
HEAD = 2 * D + 2
DIFFORA = ("diffora", "diffora-no-sharing", "diffora-random", "diffora-delta-lora")
# Inputs plus outputs of each type of module.
WIDTHS = {f"attention.self.{name}": 2 * D for name in ("query", "key", "value")}
WIDTHS |= {"attention.output.dense": 2 * D, "intermediate.dense": D + F, "output.dense": D + F}
SEARCH = ["--search-rounds", 3, "--inner-steps", 2, "--r", 4]


def chosen(output) -> dict[str, set[str]]:
    """Module type -> the blocks in which it got a pair of its own, from the adapter."""
    config = json.loads((output / "adapter" / "adapter.json").read_text())
    found: dict[str, set[str]] = {kind: set() for kind in WIDTHS}
    for layer, row in config["selection"]["layers"].items():
        for kind, selected in row.items():
            found[kind] |= {layer.rpartition(".")[2]} if selected else set()
    return found


@pytest.mark.parametrize("method", DIFFORA)
def test_diffora(method, bert, reviews, tmp_path):
    output = tmp_path / "out"
    result = train_method(output, method, bert, reviews, "--steps", 60, *SEARCH)
    selected = chosen(output)
    assert sum(map(len, selected.values())) == 2 * 3  # half of six, in each block
    own = sum(4 * WIDTHS[kind] * len(blocks) for kind, blocks in selected.items())
    shared = sum(2 * WIDTHS[kind] for kind, blocks in selected.items() if len(blocks) < 2)
    shared = 0 if method == "diffora-no-sharing" else shared
    assert result["trainable_parameters"] == own + shared + HEAD
    assert result["after"]["loss"] < result["before"]["loss"]
    assert not (output / "search.pt").exists()
    assert (result["weight_update"] is not None) == (method == "diffora-delta-lora")


@pytest.mark.parametrize("method", sorted(set(DIFFORA) - {"diffora-random"}))
def test_the_search(method, bert, reviews, tmp_path):
    output = tmp_path / "out"
    result = train_method(output, method, bert, reviews, "--steps", 2, *SEARCH)
    selected = chosen(output)
    gates = json.loads((output / "gates.json").read_text())["layers"]
    assert all(sum(row.values()) == pytest.approx(1) and len(row) == 6 for row in gates.values())
    for layer, row in gates.items():  # the selected gates are the largest three
        mine = {kind for kind, blocks in selected.items() if layer.rpartition(".")[2] in blocks}
        assert min(row[k] for k in mine) >= max(row[k] for k in set(row) - mine)
    assert (output / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["search"]["validation_loss"]) == 3
    assert len(result["search"]["training_loss"]) == 6
    assert result["search"]["seconds"] > 0


def test_the_control_does_not_search(bert, reviews, tmp_path):
    output = tmp_path / "out"
    result = train_method(output, "diffora-random", bert, reviews, "--steps", 2, *SEARCH)
    assert "search" not in result and not (output / "gates.json").exists()


@pytest.mark.parametrize("stage", ["search", "training"])
@pytest.mark.parametrize("more", [[], ["--warm-start", "--lora-dropout", 0.1]])
def test_diffora_goes_on_in_either_stage(stage, more, bert, reviews, tmp_path, monkeypatch):
    words = ["--steps", 12, *SEARCH, *more]
    whole = train_method(tmp_path / "whole", "diffora", bert, reviews, *words)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, {"search": rounds, "training": training}[stage], 5)
        args = [bert, reviews, "--output", out, "--label-column", "label", "--device", "cpu"]
        assert finetune(*args, "--lr", "0.01", "--method", "diffora", *words) == 130
    assert (out / "search.pt").exists()
    assert finetune("--resume", out) == 0
    parts = json.loads((out / "result.json").read_text())
    assert parts["loss_curve"] == whole["loss_curve"]
    assert parts["after"] == whole["after"]
    gates = [(tmp_path / d / "gates.json").read_text() for d in ("out", "whole")]
    assert gates[0] == gates[1]
    assert parts["search"]["seconds"] is None  # a part of the search ran before the stop


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ratio", 0.1], "ratio: got 0.1 of 6 modules"),
        (["--search-share", 0.01], "search_share: got 0.01 of 360 examples"),
        (["--search-share", 2], "share: got 2"),
        (["--target-modules", "query"], "target_modules: got one module in"),
        (["--gate-lr", -1], "gate_lr: got -1"),
        (["--use-rslora"], "use_rslora: got True"),
    ],
)
def test_a_search_that_cannot_be(words, told, bert, reviews, tmp_path, capsys):
    out = tmp_path / "out"
    args = [bert, reviews, "--label-column", "label", "--method", "diffora", "--output", out]
    assert finetune(*args, *words) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()
