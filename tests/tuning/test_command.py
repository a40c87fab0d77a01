"""Tables of launch configurations, and the sweep that writes them."""

import argparse
import json
import time
from dataclasses import replace

import pytest
import torch
from deltadiff.kernels import delta_update
from deltadiff.kernels.launch_configs import LAUNCH_CONFIGS
from deltadiff.kernels.lora_linear.hopper_config import HOPPER as DECLARED
from deltadiff.kernels.lora_linear.hopper_config import hopper_config
from deltadiff.kernels.runtime import tuned
from deltadiff.kernels.runtime.tuned import Launch, TableError

from deltadiff.__main__ import main
from deltadiff.ops import dispatch as paths
from deltadiff.tuning import command as tune
from deltadiff.tuning import sweep as tune_sweep
from deltadiff.tuning.sweep import Clock, Linear, Update, sweep

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
NAME = "NVIDIA Test-GPU 80GB"
ARGS = (8192, 4096, 16, 132)
KEY = (8192, 4096, 4096, 16, False)
HOPPER = Launch("lora_linear_hopper", KEY)
ROW = {"op": "lora_linear_hopper", "config": {"GROUP_SIZE_M": 4},
       "key": dict(zip(DECLARED.keys, KEY, strict=True))}  # fmt: skip
DEFAULT_ARGS = {
    "lora_linear_down": (64, 64, 8, 2),
    "lora_linear_fwd": (64, 64, 8, 2, "ieee", 99),
    "lora_linear_few": (64, 64, 64, 8, 99),
    "lora_linear_wgrad": (64, 64, 8, 2),
    "lora_linear_hopper": ARGS,
    "delta_update": ((9, 0), "nearest", 16, 2),
}


@pytest.fixture(autouse=True)
def files_again():
    yield
    for device in (CPU, GPU):
        tuned.use(device, None)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """(shipped, user's): where the tables of a GPU are that this machine need not have."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: NAME)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "shipped_path", lambda gpu: tmp_path / f"{tuned.slug(gpu)}.json")
    paths = tuned.shipped_path(NAME), tuned.user_path(NAME)
    paths[1].parent.mkdir(parents=True)
    return paths


def table(*rows, version=tuned.VERSION) -> str:
    return json.dumps({"version": version, "gpu": NAME, "rows": rows})


def chosen(device, key=KEY) -> dict:
    return DECLARED.choose(device, ARGS, key)


# ------------------------------------------------------------------------- look-up


def test_without_a_table_it_is_the_default(files):
    assert chosen(CPU) == chosen(GPU) == hopper_config(*ARGS)
    assert tuned.describe(GPU) == tuned.describe(CPU) == "defaults"


def test_row_replaces_its_entries_only(files):
    files[0].write_text(table(ROW))
    default = hopper_config(*ARGS)
    assert chosen(GPU) == default | {"GROUP_SIZE_M": 4} != default
    assert chosen(GPU, (5000, *KEY[1:])) == chosen(GPU)  # tokens up to a power of two
    for other in ((4096, *KEY[1:]), (8192, 4096, 4096, 16, True), (8192, 4096, 4096, 32, False)):
        assert chosen(GPU, other) == default
    assert chosen(CPU) == default


def test_launchers_may_change_what_they_got():
    chosen(CPU).clear()
    assert chosen(CPU) == hopper_config(*ARGS)


def test_the_users_row_comes_before_the_shipped_one(files):
    other = {**ROW, "key": {**ROW["key"], "N": 11008}}
    files[0].write_text(table(ROW, other))
    files[1].write_text(table({**ROW, "config": {"GROUP_SIZE_M": 32}}))
    assert chosen(GPU)["GROUP_SIZE_M"] == 32
    assert chosen(GPU, (8192, 11008, 4096, 16, False))["GROUP_SIZE_M"] == 4
    text = tuned.describe(GPU)
    assert f"2 shipped ({files[0]})" in text and f"1 user's ({files[1]})" in text


@pytest.mark.parametrize("op", LAUNCH_CONFIGS)
def test_rows_are_about_entries_that_launchers_know(op):
    declared = LAUNCH_CONFIGS[op]
    entries = declared.entries
    assert set(entries) <= set(declared.default(*DEFAULT_ARGS[op])) and "splits" not in entries
    for candidate in declared.candidates:
        assert candidate and set(candidate) <= set(entries)


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "change, words",
    [
        ({"op": "matmul"}, "an op of"),
        ({"key": {"M": 8192}}, "values for M, N, K"),
        ({"key": {**ROW["key"], "N": "wide"}}, "numbers, true"),
        ({"key": {**ROW["key"], "M": 5000}}, "powers of two"),
        ({"key": {**ROW["key"], "rank": 8}}, "at least 16"),
        ({"config": {"BLOCK_SIZE_Q": 64}}, "some of BLOCK_SIZE_N"),
        ({"config": {"BLOCK_SIZE_N": 96}}, "a power of two"),
        ({"config": {"STAGES": 0}}, "at least 1"),
        ({"config": {"STAGES": True}}, "at least 1"),
        ({"config": None}, "some of"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, words):
    path = tmp_path / "table.json"
    path.write_text(table(ROW, ROW | change))
    with pytest.raises(TableError, match=words) as raised:
        tuned.load(path)
    assert str(raised.value).startswith(f"{path}, row 1: got ")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1, "rows": 3}', "\xff"])
def test_what_is_no_table_is_named(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(TableError, match="deltadiff tune"):
        tuned.load(path)


def test_table_for_other_kernels_is_ignored(files):
    files[0].write_text(table({"op": "of another time"}, version=tuned.VERSION + 1))
    with pytest.warns(UserWarning, match=f"{files[0]} is for version .*: ignored"):
        assert chosen(GPU) == hopper_config(*ARGS)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "table.json"
    rows = {
        Launch("delta_update", (16, 2, "nearest")): {"num_warps": 8},
        HOPPER: {},
    }
    for _ in range(2):
        tune.write(path, NAME, rows)
        assert tuned.load(path) == rows
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(tune.ArgumentError, match="--output"):
        tune.write(path / "below a file", NAME, rows)


@pytest.mark.parametrize("shipped", sorted(tuned.shipped_path("x").parent.glob("*.json")), ids=str)
def test_shipped_tables(shipped, recwarn):
    assert tuned.load(shipped) and not recwarn
    assert shipped == tuned.shipped_path(json.loads(shipped.read_text())["gpu"])


# --------------------------------------------------------------------------- sweep

# Of rank 65 for the kernels that many tokens go to.
LINEARS = [Linear(24, 64, 48, r, torch.float16, b) for r in (4, 65) for b in (False, True)]
REMAINDER = Update(4, torch.float16, "remainder", 64)


def remainder_config() -> dict:
    """The configuration that an update of REMAINDER has now."""
    args = (0, 0), "remainder", 8, 2
    return delta_update.DELTA_UPDATE.choose(CPU, args, (8, 2, "remainder"))


def clock(seconds) -> Clock:
    """The seconds of each round are what ``seconds`` makes of an update's configuration."""
    return Clock(lambda _: remainder_config(), lambda calls, _: list(map(seconds, calls)))


@pytest.fixture
def interpreted(monkeypatch):
    """The interpreter, whose launchers ask for configurations as those of a GPU do."""
    monkeypatch.setattr(tune_sweep, "LAYERS", 2)
    if torch.cuda.is_available():
        pytest.skip("Triton compiles where there is a GPU")
    monkeypatch.setattr(
        tune_sweep, "choose_path", lambda *_, **__: paths.Dispatch("triton", "for a test")
    )


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", [*LINEARS, REMAINDER], ids=str)
def test_candidates_give_the_defaults_result(case):
    findings = sweep(case, CPU, clock=clock(lambda _: [1.0] * 3))
    inputs = case.inputs(CPU)
    assert {f.launch for f in findings} == set(tuned.asked(lambda: case.call(inputs)()))
    for f in findings:
        default = f.default.items()
        known = [c for c in LAUNCH_CONFIGS[f.launch.op].candidates if not c.items() <= default]
        assert f.tried == len(known) > 0 and f.entries == {} and f.speedup == 1.0


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("gain, wins", [(1.05, True), (1.015, False)])
def test_only_what_is_clearly_faster_is_kept(gain, wins):
    def seconds(config):
        fast = config["BLOCK_SIZE_K"] == 128 and config["num_stages"] == 3
        return [1.0, 1.1 / gain if fast else 1.1, 1.2 / gain if fast else 1.2]

    (finding,) = sweep(REMAINDER, CPU, clock=clock(seconds))
    assert finding.default_s == 1.1
    if wins:
        assert finding.entries.items() >= {("BLOCK_SIZE_K", 128), ("num_stages", 3)}
        assert finding.speedup == pytest.approx(gain)
        assert f"{finding.default['num_stages']} -> 3" in tune.describe(finding)
    else:
        assert finding.entries == {} and "is faster" in tune.describe(finding)


@pytest.mark.usefixtures("interpreted")
def test_luck_does_not_win():
    def lucky(calls, _):
        return [[1.0] * 3] + [[0.5 if len(calls) > 2 else 1.0] * 3 for _ in calls[1:]]

    (finding,) = sweep(REMAINDER, CPU, clock=Clock(lambda call: call, lucky))
    assert finding.entries == {}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("what", ["wrong", "random", "raises"])
def test_wrong_candidates_are_not_timed(monkeypatch, what):
    plain, count = delta_update.DeltaUpdate, iter(range(1000))

    class Broken(plain):
        def __init__(self, weights, *rest):
            super().__init__(weights, *rest)
            self.weights, self.block_k = weights, remainder_config()["BLOCK_SIZE_K"]

        def __call__(self, *args):
            super().__call__(*args)
            if self.block_k == 128:
                if what == "raises":
                    raise RuntimeError("out of resources")
                self.weights[0][0, 0] += 1 if what == "wrong" else next(count)

    monkeypatch.setattr(delta_update, "DeltaUpdate", Broken)
    (finding,) = sweep(REMAINDER, CPU, clock=clock(lambda _: [1.0]))
    left = [c for c in LAUNCH_CONFIGS["delta_update"].candidates if c["BLOCK_SIZE_K"] != 128]
    assert finding.tried == sum(not c.items() <= finding.default.items() for c in left) > 0


@pytest.mark.usefixtures("interpreted")
def test_candidates_are_tried_out_in_other_processes(monkeypatch):
    good, bad = {"BLOCK_SIZE_N": 16}, {"BLOCK_SIZE_K": 16}  # of which 32 columns cannot be made
    declared = replace(delta_update.DELTA_UPDATE, candidates=[good, bad])
    monkeypatch.setitem(LAUNCH_CONFIGS, "delta_update", declared)
    case = Update(4, torch.float16, "nearest", 64)
    ready, notes = tune_sweep.try_out([case], CPU, time.monotonic() + 100, workers=1)
    assert ready == {(case.kind, "delta_update", frozenset(good.items()))} and not notes
    (finding,) = sweep(case, CPU, ready, clock(lambda _: [1.0]))
    assert finding.tried == 1


# ------------------------------------------------------------------------- command


@pytest.fixture
def found(files, monkeypatch):
    """Makes the command find what a test says, on a GPU that need not be there."""
    monkeypatch.setattr(tune, "_find_gpu", lambda name: GPU)

    def find(*findings):
        monkeypatch.setattr(tune, "_findings", lambda *_: iter(findings))

    return find


def finding(entries, launch=HOPPER):
    return tune_sweep.Finding(launch, {}, entries, 1e-3, 1.1, 3)


def test_command_keeps_what_wins(files, found, capsys):
    other = Launch("delta_update", (16, 2, "nearest"))
    tune.write(files[1], NAME, {other: {"num_warps": 8}})
    found(finding({"GROUP_SIZE_M": 4}))
    assert main(["tune"]) == 0
    assert chosen(GPU)["GROUP_SIZE_M"] == 4
    assert tuned.load(files[1])[other] == {"num_warps": 8}  # not measured this time

    found(finding({}), finding({}, other))
    assert main(["tune"]) == 0
    assert tuned.load(files[1]) == {}
    assert f"0 rows in {files[1]}" in capsys.readouterr().out


def test_default_that_wins_replaces_the_shipped_row(files, found):
    files[0].write_text(table(ROW))
    found(finding({}))
    assert main(["tune"]) == 0
    assert chosen(GPU) == hopper_config(*ARGS)


def test_what_one_of_two_cases_found_stays(files, found):
    found(finding({}), finding({"GROUP_SIZE_M": 4}), finding({}))
    assert main(["tune"]) == 0
    assert chosen(GPU)["GROUP_SIZE_M"] == 4


def test_output_and_remove(files, found, tmp_path):
    found(finding({"GROUP_SIZE_M": 4}))
    assert main(["tune", "--output", str(tmp_path / "out.json")]) == 0
    assert len(tuned.load(tmp_path / "out.json")) == 1 and not files[1].exists()
    assert main(["tune"]) == 0 and files[1].exists()
    for _ in range(2):
        assert main(["tune", "--remove"]) == 0
        assert not files[1].exists()


def test_bad_table_is_an_error_of_one_line(files, found, capsys):
    files[1].write_text("{")
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(files[1]) in error and "--remove" in error


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("deltadiff: device: got 'cuda'") and "nothing to tune" in error


def cases(*argv) -> list:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return tune.chosen_cases(parser.parse_args(argv))


def test_cases_of_shapes_and_ranks():
    found = cases("--shapes", "64x32x48", "--ranks", "4", "8", "32")
    assert [(c.r, c.backward) for c in found if isinstance(c, Linear)] == [
        (8, False), (8, True), (32, False), (32, True)
    ]  # fmt: skip
    assert {(c.r, c.rounding) for c in found if isinstance(c, Update)} == {
        (r, rounding) for r in (8, 32) for rounding in tune.ROUNDINGS
    }
    assert {(c.m, c.k, c.n) for c in cases() if isinstance(c, Linear)} == {
        *tune.SHAPES, *tune.GRAPHED
    }  # fmt: skip


def test_cases_of_a_model(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128,
              "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = cases("--config", str(tmp_path / "config.json"), "--tokens", "512")
    assert {(c.m, c.k, c.n) for c in found if isinstance(c, Linear)} == {
        (512, 64, 64), (512, 64, 32), (512, 64, 96), (512, 96, 64)
    }  # fmt: skip


@pytest.mark.gpu
def test_tune_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "table.json"
    shapes = ["--shapes", "64x256x512", "1024x512x768"]
    assert main(["tune", *shapes, "--ranks", "8", "--output", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "left out" not in out + err and out.count(": lora_linear_") >= 4
    assert out.count(": delta_update ") == 3
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert out.count(": lora_linear_hopper ") == 2 * hopper
    tuned.load(path)
