"""The sm_90 kernel of `lora_linear`: its schedule on any machine, its results on an H100."""

from types import SimpleNamespace

import pytest
import torch
from hopper_calls import check, on_hopper, run
from lora_linear_calls import assert_frozen_A_keeps_no_x, doubles, inputs

from deltadiff import lora_linear
from deltadiff.errors import BackendUnavailableError
from deltadiff.kernels.lora_linear import hopper_launch as hopper
from deltadiff.kernels.lora_linear import schedule
from deltadiff.kernels.lora_linear.portable import rank_part
from deltadiff.ops.reference import lora_linear_ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------ the order of work


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("group, rows_per_split", [(8, 8), (16, 4), (4, 1)])
def test_work_is_drawn_once_and_after_what_it_waits_for(group, rows_per_split, rows):
    rank_item, first_tile, column_item = (
        getattr(schedule, name).value for name in ("RANK_ITEM", "FIRST_TILE", "COLUMN_ITEM")
    )
    for blocks_m in (*range(1, 3 * group + 2), 5 * group, 8 * group + 1):
        for blocks_n, columns in ((1, 0), (1, 2), (3, 5), (16, 4)):
            items = [(i, rank_item) for i in range(-(-blocks_m // rows))]
            tiles = [(m, first_tile + n) for m in range(blocks_m) for n in range(blocks_n)]
            splits = range(-(-blocks_m // rows_per_split))
            ends = [(i, column_item + c) for i in splits for c in range(columns)]
            sizes = SimpleNamespace(
                blocks_m=blocks_m, blocks_n=blocks_n, columns=columns,
                rows_per_split=rows_per_split, GROUP_SIZE_M=group, ROWS=rows,
            )  # fmt: skip
            work = [
                schedule.Schedule.work_item.fn(sizes, t)
                for t in range(len(items) + len(tiles) + len(ends))
            ]
            case = f"{blocks_m} x {blocks_n}, {columns} columns"
            assert sorted(work) == sorted(items + tiles + ends), case
            place = {w: t for t, w in enumerate(work)}
            for m in range(blocks_m):
                first_of_group = (m // group * group, first_tile)
                assert place[m // rows, rank_item] < place[first_of_group], case
                for c in range(columns):
                    column = place[m // rows_per_split, column_item + c]
                    assert column > place[m // rows, rank_item], case
            if columns:
                assert work[-1] == ends[-1], case


# -------------------------------------------------------------------------- its inputs


@pytest.mark.parametrize("r", [1, 3, 8, 16, 33])
@pytest.mark.parametrize("stored", ["adapters in float32", "transposed", "pitch", "offset"])
def test_factors_are_packed_for_tma(r, stored, randn):
    n, k, wide = 520, 264, F32 if stored == "adapters in float32" else F16
    a, b = (randn(*shape, dtype=wide, device=DEVICE) for shape in ((r, k), (n, r)))
    if stored == "transposed":
        a, b = a.T.contiguous().T, b.T.contiguous().T
    elif stored == "pitch":
        a, b = (torch.cat([t, t], 1)[:, : t.shape[1]] for t in (a, b))
    elif stored == "offset":
        a, b = (torch.cat([t[:, -1:], t], 1)[:, 1:] for t in (a, b))
    for packed, given in zip(hopper.packed(a, b, F16), (a, b), strict=True):
        assert torch.equal(packed, given.to(F16))
        assert packed.stride(1) == 1 and packed.stride(0) % 8 == 0 and packed.data_ptr() % 16 == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m, r", [(512, 1), (513, 3), (700, 16), (1001, 33), (640, 200)])
def test_what_is_kept_for_backward(m, r, gated):
    kept = torch.zeros(hopper.kept_shape(m, r, gated))
    u, s = hopper._kept_views(kept, r, BF16)
    assert u.shape == (m, -(-r // 8) * 8) and u.is_contiguous() and u.data_ptr() % 16 == 0
    u.fill_(1)
    if gated:
        assert s.shape == (m, r) and s.is_contiguous() and not s.any()
        s.fill_(2)
        assert (u == 1).all() and u.numel() / 2 + s.numel() == kept.numel()
    else:
        assert s is None
    assert rank_part(kept, r).shape == (m, r)


# ----------------------------------------------------------------------------- results


CASES = [  # tokens, in, out, r, entries of the gate, bias, adapters in float32
    (512, 4096, 4096, 16, None, False, False),
    (512, 520, 776, 1, None, True, True),
    (512, 8, 8, 3, (3,), True, False),
    (640, 64, 136, 8, None, True, False),
    (640, 776, 520, 33, (33,), False, True),
    (1000, 520, 776, 64, (64,), True, False),
    (1000, 1024, 4096, 16, (16,), True, True),
    (1000, 136, 64, 32, None, False, False),
    (2048, 4096, 1024, 8, None, False, True),
    (2048, 264, 1032, 33, None, True, False),
    (2048, 1032, 264, 64, None, False, True),
    (256, 4096, 4096, 16, None, False, True),
    (300, 520, 776, 24, (24,), True, False),
    (1000, 1032, 520, 65, (65,), True, True),
    (2048, 520, 1032, 128, None, False, False),
    (640, 1032, 776, 200, None, False, True),
    (4096, 1024, 2048, 256, (256,), True, False),
    (4096, 2048, 2048, 16, (16,), True, False),
    (16384, 1024, 1536, 32, (32,), True, False),
]


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case[:4])))
def test_output_and_gradients(dtype, case, randn, assert_close):
    *shape, gate, bias, mixed = case
    few = gate is not None and gate[0] < 16  # the error of a few numbers is luck
    draws = [
        inputs(randn, *shape, dtype, "cuda", F32 if mixed else dtype, gate, bias)
        for _ in range(12 if few else 1)
    ]
    check(assert_close, draws, dtype)


@on_hopper
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("gate_dtype", [F32, BF16], ids=str)
def test_a_scalar_gate(shape, gate_dtype, randn, assert_close):
    draws = [inputs(randn, 520, 136, 72, 4, BF16, "cuda", gate=shape) for _ in range(12)]
    for given in draws:
        given[4] = given[4].to(gate_dtype)
    check(assert_close, draws, BF16)


@on_hopper
@pytest.mark.parametrize("shape", [(), (8,)])
def test_a_gate_of_zeros_has_a_gradient(shape, randn, assert_close):
    found, eager, truth = [], [], []
    for _ in range(12):
        given = inputs(randn, 600, 264, 136, 8, BF16, "cuda", gate=shape)
        given[4].zero_()
        ours, theirs = run(given), run(given, lora_linear_ref)
        right = run(doubles(given), lora_linear_ref)
        assert not ours["lora_A"].any() and not ours["lora_B"].any()
        for name in ("y", "x"):
            assert_close(ours[name], theirs[name], right[name], 2)
        for side, results in ((found, ours), (eager, theirs), (truth, right)):
            side.append(results["gate"])
    assert_close(*map(torch.stack, (found, eager, truth)), 3, BF16)


def columns(t, start, pitch):
    """The same values as columns of a wider matrix of NaN."""
    wide = t.new_full((t.shape[0], pitch), torch.nan)
    wide[:, start : start + t.shape[1]] = t
    return wide[:, start : start + t.shape[1]]


@on_hopper
@pytest.mark.parametrize(
    "change",
    [
        {"x": lambda t: columns(t, 8, 280)},
        {"x": lambda t: columns(t, 3, 280)},
        {"x": lambda t: columns(t, 0, 269)},
        {"x": lambda t: t.T.contiguous().T},
        {"x": lambda t: t[:1].expand_as(t)},
        {"x": lambda t: t.view(-1).as_strided(t.shape, (8, 1))},
        {"weight": lambda t: columns(t, 16, 304)},
        {"weight": lambda t: columns(t, 1, 265)},
        {"weight": lambda t: t.T.contiguous().T},
        {"lora_A": lambda t: columns(t, 1, 270), "lora_B": lambda t: columns(t, 1, 9)},
        {"lora_A": lambda t: t.T.contiguous().T, "lora_B": lambda t: t.T.contiguous().T},
        {"gate": lambda t: columns(t[:, None], 1, 3)[:, 0]},
        {"gate": lambda t: torch.cat([t, t])[1:9]},
        {"bias": lambda t: columns(t[:, None], 1, 3)[:, 0]},
        {"bias": lambda t: torch.cat([t, t])[1 : 1 + t.numel()]},
        {"dy": lambda t: columns(t, 8, 320)},
        {"dy": lambda t: columns(t, 1, 137)},
        {"dy": lambda t: t.T.contiguous().T},
        {"dy": lambda t: t[:1].expand_as(t)},
        {"dy": lambda t: t[:1, :1].expand_as(t)},
    ],
    ids=lambda change: "+".join(change),
)
def test_strides(change, randn, assert_close):
    names = ("x", "weight", "lora_A", "lora_B", "gate", "bias", "dy")
    given = dict(
        zip(names, inputs(randn, 640, 264, 136, 8, BF16, "cuda", None, (8,), True), strict=True)
    )
    for name, function in change.items():
        given[name] = function(given[name])
    check(assert_close, [list(given.values())], BF16)


@on_hopper
def test_few_tokens_go_to_the_portable_kernels(randn):
    given = inputs(randn, 255, 264, 136, 8, BF16, "cuda", F32, (8,), True)
    expected = run(given, backend="triton")
    assert all(torch.equal(value, expected[name]) for name, value in run(given).items())


@on_hopper
def test_a_pass_is_one_launch(randn):
    x, w, a, b, _, _, dy = inputs(randn, 640, 264, 136, 8, BF16, "cuda")
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    lora_linear(x, w, a, b, scaling=2.0, backend="hopper").backward(dy)  # compiles
    launched = []
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            if not launched:
                y = lora_linear(x, w, a, b, scaling=2.0, backend="hopper")
            else:
                torch.autograd.grad(y, (x, a, b), dy)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        launched.append([name for name in names if "Sync" not in name])
    assert launched == [["_lora_linear_hopper_kernel"]] * 2


@on_hopper
@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "gate", "bias"])
def test_only_what_is_asked_for_gets_a_gradient(wanted, randn):
    given = inputs(randn, 640, 264, 136, 8, BF16, "cuda", F32, (8,), True)
    everything = run(given)
    names = dict(zip(("x", "weight", "lora_A", "lora_B", "gate", "bias"), given, strict=False))
    names[wanted].requires_grad_()
    x, w, a, b, gate, bias = names.values()
    y = lora_linear(x, w, a, b, scaling=0.7, gate=gate, bias=bias, backend="hopper")
    y.backward(given[-1])
    assert torch.equal(names[wanted].grad, everything[wanted])
    assert all(t.grad is None for name, t in names.items() if name != wanted)


@on_hopper
@pytest.mark.parametrize("r", [8, 128])
@pytest.mark.parametrize("tokens", [8, 640])
def test_a_frozen_A_keeps_no_activation(r, tokens, randn):
    given = inputs(randn, tokens, 264, 136, r, BF16, "cuda", F32, (r,), True)
    assert_frozen_A_keeps_no_x(given, ["x", "lora_B", "gate", "bias"], backend="hopper")


@on_hopper
def test_inputs_that_move_between_the_passes(randn, assert_close):
    """What autograd brings back may lie otherwise in memory than what the forward pass saw."""

    def offloaded(given):
        with torch.autograd.graph.save_on_cpu():
            return run(given)

    for start, pitch in ((0, 269), (8, 280)):
        given = inputs(randn, 640, 264, 136, 8, BF16, "cuda", gate=(8,))
        given[0] = columns(given[0], start, pitch)
        check(assert_close, [given], BF16, offloaded)


@on_hopper
def test_leading_dimensions(randn):
    x, w, a, b, _, _, dy = inputs(randn, 660, 264, 136, 8, BF16, "cuda")
    flat = run([x, w, a, b, None, None, dy])
    deep = run([x.view(2, 3, 110, 264), w, a, b, None, None, dy.view(2, 3, 110, 136)])
    for name, value in deep.items():
        assert torch.equal(value.reshape(flat[name].shape), flat[name]), name
    empty = run([x[:0], w, a, b, None, None, dy[:0]])
    assert empty["y"].shape == (0, 136) and not empty["lora_A"].any()


@on_hopper
@pytest.mark.parametrize("n, r, reason", [(264, 257, "rank 257 > 256"), (12, 8, "12 x 264: TMA")])
def test_layers_that_it_cannot_take(n, r, reason, randn):
    given = inputs(randn, 640, 264, n, r, BF16, "cuda")
    with pytest.raises(BackendUnavailableError, match=reason):
        run(given)
    run(given, backend=None)


@on_hopper
@pytest.mark.parametrize(
    "shape", [(8192, 4096, 4096, 16), (1000, 520, 776, 33), (1000, 520, 776, 128)], ids=str
)
def test_two_runs_are_bit_equal(shape, randn):
    given = inputs(randn, *shape, BF16, "cuda", gate=(shape[-1],), bias=True)
    first, second = run(given), run(given)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
