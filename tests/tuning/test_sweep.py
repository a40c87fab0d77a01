"""The sweep: candidates are compiled, compared with the default and timed beside it."""

import time
from dataclasses import replace

import pytest
import torch
from launch_tables import CPU, read_files_again

from deltadiff.kernels import delta_update
from deltadiff.kernels.launch_configs import LAUNCH_CONFIGS
from deltadiff.kernels.runtime import tuned
from deltadiff.ops.dispatch import Dispatch
from deltadiff.tuning import cases, command
from deltadiff.tuning import sweep as tuning_sweep
from deltadiff.tuning.cases import Linear, Update
from deltadiff.tuning.sweep import Clock, sweep

# Layers of rank 65 take the kernels for many tokens.
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
    """Run the cases in Triton's interpreter; its launchers ask for configurations too."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles where there is a GPU")
    monkeypatch.setattr(cases, "LAYERS", 2)
    monkeypatch.setattr(cases, "choose_path", lambda *_, **__: Dispatch("triton", "for a test"))
    yield
    read_files_again()


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
        assert f"{finding.default['num_stages']} -> 3" in command.describe(finding)
    else:
        assert finding.entries == {} and "is faster" in command.describe(finding)


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
    good, bad = (
        {"BLOCK_SIZE_N": 16},
        {"BLOCK_SIZE_K": 16},
    )  # 32 columns are not a multiple of blocks of 16 tiles
    declared = replace(delta_update.DELTA_UPDATE, candidates=[good, bad])
    monkeypatch.setitem(LAUNCH_CONFIGS, "delta_update", declared)
    case = Update(4, torch.float16, "nearest", 64)
    ready, notes = tuning_sweep.try_out([case], CPU, time.monotonic() + 100, workers=1)
    assert ready == {(case.kind, "delta_update", frozenset(good.items()))} and not notes
    (finding,) = sweep(case, CPU, ready, clock(lambda _: [1.0]))
    assert finding.tried == 1
