"""`deltadiff verify --full` must be able to fail: wrong by a little, or beside the outputs."""

import json
from functools import partial

import pytest
import torch
from commands import refused

from deltadiff.__main__ import main
from deltadiff.ops import decode_4bit, decode_fp8
from deltadiff.verify import command
from deltadiff.verify.grid import (
    adamw_step,
    delta_update,
    draws,
    gated_mlp,
    lora_linear,
    step_counters,
)
from deltadiff.verify.grid.memory import GuardedAllocations, Layout, Memory
from deltadiff.verify.grid.run import groups_of, run_grid, run_number

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    monkeypatch.setattr(draws, "ON_CPU", draws.INTERPRETED)


LAYOUTS = [Layout(), Layout(3, gap=5), Layout(step=2), Layout(1, transposed=True)]


def failed(op: str, cases: int = 40, backend: str = "cpp") -> str:
    """The failed checks of some cases, as one text."""
    cells = run_grid(CPU, 2, [op], backend, cases=cases, workers=1)
    assert sum(cell.failures for cell in cells) == sum(len(cell.failed) for cell in cells)
    return "\n".join(what for cell in cells for _, _, what in cell.failed)


# ---------------------------------------------------------------- lora_linear


def harmed(harm):
    real = lora_linear.lora_linear
    return lambda x, **options: harm(real, x, **options)


def outside(real, x, **options):
    """Reads the element after x."""
    beyond = x.as_strided((1,), (1,), x.storage_offset() + x.numel())
    return real(x, **options) + 0 * beyond


def scribbles(real, x, **options):
    """Writes before the first element of x."""
    x.detach().as_strided((1,), (1,), x.storage_offset() - 1).fill_(3.0)
    return real(x, **options)


def swallows(real, x, **options):
    return torch.nan_to_num(real(x, **options))


def slightly_off(real, x, **options):
    return real(x, **options) * 1.02


HARMS = [
    (outside, "where eager PyTorch has"), (scribbles, "memory beside"),
    (swallows, "where eager PyTorch has"), (slightly_off, "y: error"),
]  # fmt: skip


@pytest.mark.parametrize("harm, symptom", HARMS)
def test_lora_linear(harm, symptom, monkeypatch):
    assert not failed("lora_linear", 20)
    monkeypatch.setattr(lora_linear, "lora_linear", harmed(harm))
    assert symptom in failed("lora_linear", 60 if harm is swallows else 20)


# --------------------------------------------------- over 4 bits, and whole blocks


@pytest.mark.parametrize("op, module", [("decode_4bit", decode_4bit), ("decode_fp8", decode_fp8)])
def test_weights_of_few_bits(op, module, monkeypatch):
    assert not failed(op, 10)
    real = getattr(module, f"{op}_ref")

    def wrong(numbers, scales, *args):
        return real(numbers, scales * 1.05, *args)

    monkeypatch.setattr(module, f"{op}_ref", wrong)
    text = failed(op, 10)
    assert "y: error" in text and "W: error" in text


def test_gated_mlp(monkeypatch):
    assert not failed("gated_mlp", 10)
    real = gated_mlp.gated_mlp
    monkeypatch.setattr(gated_mlp, "gated_mlp", lambda *args: real(*args) * 1.05)
    assert "y: error" in failed("gated_mlp", 10)


def test_gated_mlp_under_checkpointing(monkeypatch):
    def wrong(block, x, layers, use_reentrant):
        return block(x * 1.001, layers)

    monkeypatch.setattr(gated_mlp, "checkpoint", wrong)
    assert "checkpointed and not: error" in failed("gated_mlp", 20)


# ---------------------------------------------------------------- the others


def test_delta_update(monkeypatch):
    real = delta_update.delta_update_

    def beside(weight, *args, **options):
        real(weight, *args, **options)
        weight[0].as_strided((1,), (1,), weight[0].storage_offset() - 1).fill_(3.0)

    monkeypatch.setattr(delta_update, "delta_update_", beside)
    assert "memory beside" in failed("delta_update")
    monkeypatch.setattr(
        delta_update, "delta_update_", lambda *a, **k: real(*a, **{**k, "apply": None})
    )
    assert "apply=0" in failed("delta_update")


def test_adamw_step(monkeypatch):
    real = adamw_step.adamw_step_

    def no_decay(*args, **options):
        real(*args, **{**options, "weight_decay": 0.0})

    monkeypatch.setattr(adamw_step, "adamw_step_", no_decay)
    assert "p': error" in failed("adamw_step")


def test_step_counters(monkeypatch):
    def nothing(backend, *args):
        pass

    monkeypatch.setattr(step_counters, "advance_counters", nothing)
    text = failed("step_counters", backend="reference")
    assert all(name in text for name in ("iteration", "steps", "flags", "rank_scales"))


# -------------------------------------------------------------------- memory


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("written", [False, True])
def test_what_is_beside_a_tensor(layout, written):
    memory, values = Memory(float("nan")), torch.arange(12.0).view(3, 4)
    placed = memory.place(values, layout, written)
    assert torch.equal(placed, values) and memory.disturbed() == 0
    placed[1, 2] = 7
    assert memory.disturbed() == (0 if written else 1)
    placed.as_strided((1,), (1,), placed.storage_offset() - 1).fill_(0)
    assert memory.disturbed() == (1 if written else 2)


def test_borders_of_what_is_allocated():
    with GuardedAllocations() as guard:
        made = torch.empty(5, 6)
        other = made.new_empty((7,), dtype=torch.int64)
    assert made.isnan().all() and (other == -1).all() and guard.overrun() == 0
    made.as_strided((1,), (1,), made.storage_offset() + 30).fill_(1)
    assert guard.overrun() == 4  # bytes


def test_allocations_inside_of_operations_are_seen():
    x, w, a, b = (torch.ones(s) for s in ((3, 4), (5, 4), (2, 4), (5, 2)))
    with GuardedAllocations() as guard:
        torch.ops.deltadiff.lora_linear_bwd(
            torch.ones(3, 5), x, w, a, b, torch.ones(3, 2), 1.0, None, [True] * 4, 0.0, None, "cpp"
        )
    assert len(guard.made) >= 2  # of the gradients of A and B


# ------------------------------------------------------------------- command


def test_a_case_is_the_same_on_its_own():
    group = groups_of("adamw_step")[8]
    rows = run_number(CPU, 5, "adamw_step", group.first + 3)
    again = run_number(CPU, 5, "adamw_step", group.first + 3)
    assert rows == again and {row.path for row in rows} == {group.path}
    assert rows != run_number(CPU, 6, "adamw_step", group.first + 3)


def test_full_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "run_grid", partial(run_grid, cases=6, workers=1))
    options = ["verify", "--full", "--op", "adamw_step", "--backend", "cpp", "--seed", "4"]
    assert main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for row in report["rows"]:
        assert row["op_suite"] == "verify" and row["path"] == "cpp" and row["cases"] == 2
        assert row["failures"] == 0 and 0 < row["worst_ratio"] < 1

    real = adamw_step.adamw_step_
    wrong = lambda *args, **options: real(*args, **{**options, "lr": 0.2})  # noqa: E731
    monkeypatch.setattr(adamw_step, "adamw_step_", wrong)
    assert main(options) == 1
    text = capsys.readouterr().out
    command_line = next(line for line in text.splitlines() if line.startswith("NO"))
    assert main(command_line.split()[2:]) == 1
    assert "1 failed" in capsys.readouterr().out


def test_bad_options(capsys):
    assert "--full, --seed and one --op" in refused(capsys, "verify", "--case", "3")
    full = ["verify", "--full", "--seed", "1", "--op", "lora_linear", "--case"]
    assert "a case of lora_linear" in refused(capsys, *full, "999999")
    hopper = next(group.first for group in groups_of("lora_linear") if group.path == "hopper")
    assert "NVIDIA GPUs" in refused(capsys, *full, str(hopper))
