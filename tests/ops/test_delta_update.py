"""`delta_update_` on every backend: against float64, and bit for bit where one answer is right."""

from dataclasses import replace

import pytest
import torch
from delta_update_calls import factors, remainder_like, roundings, same_values, value

from deltadiff import delta_update_
from deltadiff.checks import dtype_name
from deltadiff.ops import reference as ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Triton's interpreter computes with NumPy, which warns of what GPUs do quietly.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
SHAPES = [(24, 64, 4), (37, 129, 3), (40, 264, 17), (1, 8, 1), (5, 3, 2)]  # N, K, r


@pytest.mark.parametrize("mixed", [False, True], ids=["adapters-like-W", "adapters-float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(path, dtype, shape, mixed, randn, assert_close):
    n, k, r = shape
    adapter = F32 if mixed else dtype
    a, b, da, db = factors(randn, n, k, r, adapter, path.device)
    start = randn(n, k, dtype=dtype, device=path.device)
    scale = 0.3 * r**-0.5
    a0, b0 = a.double() - da.double(), b.double() - db.double()
    truth = start.double() + scale * (b.double() @ a.double() - b0 @ a0)
    for rounding in roundings(dtype):
        w, low = start.clone(), remainder_like(start) if rounding == "remainder" else None
        delta_update_(w, a, b, da, db, scale=scale, rounding=rounding, remainder=low, seed=3,
                      backend=path.backend)  # fmt: skip
        eager = start.float() if rounding == "remainder" else start.clone()
        eager += scale * (b.float() @ a.float() - b0.float() @ a0.float())
        assert_close(value(w, low), eager, truth, 2)
        if rounding != "stochastic":
            assert ((w.double() - truth).norm() / truth.norm()) <= torch.finfo(dtype).eps


def odd_values(w):
    """Some elements that round in other ways: tiny, huge, not finite."""
    flat = w.flatten()
    flat[0::7] *= 2.0**-16
    flat[1::11] *= 2.0**12
    if flat.numel() > 40:
        flat[20:24] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0]).to(w)
    return flat.view(w.shape)


@pytest.mark.parametrize("scale", [2.0**-9, -(2.0**-18), 2.0**-27])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_reference(path, dtype, shape, scale, randn, randint):
    """With factors of small integers the product is exact, so every rounding has one answer. Where
    a factor is infinite, W is not finite, and it stays so."""
    n, k, r = shape
    a, b, da, db = factors(randint, n, k, r, F32, path.device)
    a[:, 2] = float("inf")  # makes the NaN of the machine's own arithmetic
    finite = [j for j in range(k) if j != 2]
    start = odd_values(randn(n, k, dtype=dtype, device=path.device))
    for rounding in roundings(dtype):
        w, low = start.clone(), remainder_like(start) if rounding == "remainder" else None
        expected, expected_low = w.clone(), None if low is None else low.clone()
        for step in (0, 1, 2**40 + 3):
            where = {"seed": -(2**40) - 5, "step": step}
            delta_update_(w, a, b, da, db, scale=scale, rounding=rounding, remainder=low,
                          backend=path.backend, **where)  # fmt: skip
            ref.delta_update_ref_(expected, a, b, da, db, scale=scale, rounding=rounding,
                                  remainder=expected_low, **where)  # fmt: skip
            assert same_values(w[:, finite], expected[:, finite]), rounding
            assert low is None or same_values(low[:, finite], expected_low[:, finite])
            assert not w[:, 2].isfinite().any() and not expected[:, 2].isfinite().any()


@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
def test_bfloat16_bits_in_the_interpreter(shape, rounding, randn, randint):
    """Triton's interpreter rounds to bfloat16 wrongly; these two roundings do it by integers."""
    from deltadiff.kernels import delta_update as kernels

    n, k, r = shape
    a, b, da, db = factors(randint, n, k, r, F32, "cpu")
    w = odd_values(randn(n, k, dtype=BF16))
    lows = [remainder_like(w)] if rounding == "remainder" else []
    expected, expected_lows = w.clone(), [t.clone() for t in lows]
    step = torch.tensor(3)
    kernels.delta_update_([w], [a], [b], [da], [db], [2.0**-9], rounding, lows, 8, step, None)
    ref.delta_update_ref_(expected, a, b, da, db, scale=2.0**-9, rounding=rounding, seed=8,
                          step=step, remainder=expected_lows[0] if lows else None)  # fmt: skip
    assert same_values(w, expected)
    assert all(same_values(t, other) for t, other in zip(lows, expected_lows, strict=True))


def transposed(t):
    return t.T.contiguous().T


def padded(t):
    """Rows of 64 elements and more, of which t has the first; rows start at multiples of 16."""
    wide = t.new_zeros(t.shape[0], max(64, t.shape[1] + -t.shape[1] % 16))
    return wide[:, : t.shape[1]].copy_(t)


def shifted(t):
    """Rows that start one element after a multiple of 16 bytes."""
    return t.new_zeros(t.shape[0], t.shape[1] + 8)[:, 1 : 1 + t.shape[1]].copy_(t)


def every_other(t):
    return t.new_zeros(t.shape[0], t.shape[1], 2)[:, :, 0].copy_(t)


@pytest.mark.parametrize("layout", [transposed, padded, shifted, every_other])
@pytest.mark.parametrize("k", [64, 60])
def test_strides(path, dtype, layout, k, randn, randint):
    """The bits of the contiguous weight, and nothing changed between its elements."""
    n, r = 24, 4
    given = factors(randint, n, k, r, F32, path.device)
    start = randn(n, k, dtype=dtype, device=path.device)
    for rounding in roundings(dtype):
        options = {"scale": 2.0**-9, "rounding": rounding, "seed": 1, "backend": path.backend}
        w, low = start.clone(), remainder_like(start) if rounding == "remainder" else None
        delta_update_(w, *given, remainder=low, **options)
        other, other_low = layout(start), None if low is None else layout(remainder_like(start))
        delta_update_(other, *map(layout, given), remainder=other_low, **options)
        assert torch.equal(other, w), rounding
        assert low is None or torch.equal(other_low, low)
        if layout is not transposed:
            other.zero_()
            assert not other._base.any()


def test_a_list_is_its_weights_one_by_one(path, dtype, randn):
    """Mixed shapes, ranks, strides and scales; only "stochastic" knows the position."""
    shapes = [*SHAPES, (33, 72, 40)]
    weights = [randn(n, k, dtype=dtype, device=path.device) for n, k, _ in shapes]
    weights[1] = weights[1].T.contiguous().T
    adapters = [dtype if i % 2 else F32 for i in range(len(shapes))]  # two dtypes of adapters
    given = [
        factors(randn, *shape, adapter, path.device)
        for shape, adapter in zip(shapes, adapters, strict=True)
    ]
    scales = [0.1 * (i + 1) for i in range(len(shapes))]
    for rounding in roundings(dtype):
        ws = [w.clone() for w in weights]
        lows = [remainder_like(w) for w in ws] if rounding == "remainder" else None
        result = delta_update_(ws, *zip(*given, strict=True), scale=scales, rounding=rounding,
                               remainder=lows, seed=9, step=4, backend=path.backend)  # fmt: skip
        assert all(w is t for w, t in zip(ws, result, strict=True))
        for i, w in enumerate(weights):
            alone = w.clone()
            low = None if lows is None else remainder_like(alone)
            delta_update_(alone, *given[i], scale=scales[i], rounding=rounding, remainder=low,
                          seed=9, step=4, backend=path.backend)  # fmt: skip
            if rounding == "stochastic" and i and w.numel() > 100:
                assert not torch.equal(alone, ws[i])
            elif rounding != "stochastic":
                assert torch.equal(alone, ws[i])
            assert low is None or torch.equal(low, lows[i])


def test_an_empty_list_is_no_work(path):
    assert delta_update_([], [], [], [], [], scale=[], backend=path.backend) == []


def test_stochastic_is_unbiased(path, dtype):
    """An update of a quarter of a unit in the last place goes through for a quarter of them."""
    if dtype == F32:
        pytest.skip("float32 weights are not rounded stochastically")
    n, k = 64, 256
    unit = torch.finfo(dtype).eps
    w = torch.ones(n, k, dtype=dtype, device=path.device)
    one_row, one_column = w.new_ones(1, k, dtype=F32), w.new_ones(n, 1, dtype=F32)
    zeros = torch.zeros_like(one_row), one_column
    changed = []
    for step in range(2):
        t = w.clone()
        delta_update_(t, one_row, one_column, *zeros, scale=unit / 4, rounding="stochastic",
                      step=step, backend=path.backend)  # fmt: skip
        assert set(t.unique().tolist()) == {1.0, 1.0 + unit}
        changed.append((t > 1).double())
    deviation = (0.25 * 0.75 / (n * k)) ** 0.5
    assert abs(changed[0].mean().item() - 0.25) < 5 * deviation
    both = (changed[0] * changed[1]).mean().item()  # two steps are independent
    assert abs(both - 1 / 16) < 5 * (15 / 256 / (n * k)) ** 0.5


LEAST = 2.0**-16  # from here to 65504, float16 and its remainder hold every float32


@pytest.mark.check(short=1, long=100)
def test_remainder_is_float32_arithmetic(path, dtype, seed, tally):
    """1000 updates of 1e-9 to 1e-2: bit-equal to a weight in float32.

    Beside float16 that holds for the elements that never came below `LEAST`. One that did is off
    by at most 2^-40 for each step, and by a unit in the last place of the float32 for each step.
    """
    if dtype == F32:
        pytest.skip("float32 weights have no remainder")
    generator = torch.Generator().manual_seed(seed)
    steps, k = 1000 if path.backend != "triton" or path.device.type == "cuda" else 40, 256
    sizes = torch.empty(k).uniform_(-15.9, 15.9, generator=generator).exp2()
    sizes[: k // 2] = torch.empty(k // 2).uniform_(-14, 0, generator=generator).exp2()
    w = (sizes * torch.randn(k, generator=generator).sign())[None].to(path.device, dtype)
    low, wide = remainder_like(w), w.float()
    exact, off = torch.ones_like(wide, dtype=torch.bool), torch.zeros_like(wide)
    one, zero = torch.ones(1, 1, device=path.device), torch.zeros(1, k, device=path.device)
    options = {"scale": 1.0, "backend": path.backend}
    for _ in range(steps):
        size = 10 ** torch.empty(k).uniform_(-9, -2, generator=generator)
        update = (size * torch.randn(k, generator=generator).sign())[None].to(path.device)
        delta_update_(w, update, one, zero, one, remainder=low, **options)
        delta_update_(wide, update, one, zero, one, **options)
        if dtype == F16:
            exact &= (wide.abs() >= LEAST) & (wide.abs() <= 65504)
            off += 2.0**-40 + 2.0**-23 * wide.abs()
    joined = ref.join_remainder(w, low)
    wrong = (joined != wide) & (exact | ((joined - wide).abs() > off))
    tally("verify", "delta_update: remainder against float32", steps, int(wrong.any()),
          f"{path.backend}-{path.device.type}", dtype_name(dtype))  # fmt: skip
    assert not wrong.any() and exact.sum() > k / 2


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_float16_remainder_has_the_bits_of_the_reference_for_every_weight(path):
    """All bit patterns of float16, with updates that cross binades, zero and the end of range."""
    if path.backend == "reference":
        pytest.skip("it is the reference")
    generator = torch.Generator().manual_seed(0)
    start = torch.arange(-(2**15), 2**15).to(torch.int16).view(F16).view(256, 256)
    some = torch.randint(-(2**15), 2**15, start.shape, generator=generator).to(torch.int16)
    for factor in (0.0, 2.0**-45, 2.0**-39, 2.0**-24, 2.0**-11, 0.3, 40.0, 1e30):
        given = (torch.randn(1, 256, generator=generator) * factor, torch.ones(256, 1),
                 torch.zeros(1, 256), torch.ones(256, 1))  # fmt: skip
        given = [t.to(path.device) for t in given]
        w, low = start.clone().to(path.device), some.clone().to(path.device)
        expected, expected_low = w.clone(), low.clone()
        delta_update_(w, *given, scale=1.0, remainder=low, backend=path.backend)
        ref.delta_update_ref_(expected, *given, scale=1.0, rounding="remainder",
                              remainder=expected_low)  # fmt: skip
        assert same_values(w, expected) and torch.equal(w.signbit(), expected.signbit()), factor
        assert torch.equal(low, expected_low), factor
        assert w[start.isfinite()].isfinite().all(), factor


@pytest.mark.parametrize(
    "apply", [torch.tensor(False), torch.tensor(0.0), torch.tensor(0)], ids=str
)
def test_apply_zero_changes_nothing(path, dtype, apply, randn):
    n, k, r = 9, 40, 2
    given = factors(randn, n, k, r, F32, path.device)
    apply = apply.to(path.device)
    for rounding in roundings(dtype):
        w = randn(n, k, dtype=dtype, device=path.device)
        low = remainder_like(w) if rounding == "remainder" else None
        before, options = w.clone(), {"scale": 1.0, "rounding": rounding, "backend": path.backend}
        delta_update_(w, *given, remainder=low, apply=apply, **options)
        assert torch.equal(w, before) and (low is None or not low.any())
        delta_update_(w, *given, remainder=low, apply=apply + 1, **options)
        again = before.clone()
        delta_update_(
            again, *given, remainder=None if low is None else remainder_like(w), **options
        )
        assert torch.equal(w, again) and not torch.equal(w, before)


def test_step_as_a_tensor_is_the_same_step(path, dtype, randn):
    w = randn(8, 32, dtype=dtype, device=path.device)
    given = factors(randn, 8, 32, 2, F32, path.device)
    results = [
        delta_update_(w.clone(), *given, scale=0.1, rounding=roundings(dtype)[-1], step=step,
                      remainder=remainder_like(w) if dtype != F32 else None, backend=path.backend)
        for step in (6, torch.tensor(6, device=path.device))
    ]  # fmt: skip
    assert torch.equal(*results)


def test_factors_are_kept(path, randn):
    w = randn(8, 32, device=path.device)
    given = factors(randn, 8, 32, 2, F32, path.device)
    before = [t.clone() for t in given]
    delta_update_(w, *given, scale=0.1, backend=path.backend)
    assert all(torch.equal(t, old) for t, old in zip(given, before, strict=True))


@pytest.mark.parametrize("blocks", [(32, 32), (64, 256)], ids=str)
def test_blocks_do_not_change_the_result(path, dtype, blocks, randn, monkeypatch):
    """The order of an element's sum and its random bits are its own."""
    if path.backend != "triton":
        pytest.skip("the Triton kernels alone can be given other blocks")
    from deltadiff.kernels import delta_update as kernels

    shapes = [(40, 136, 5), (33, 70, 3)]
    weights = [randn(n, k, dtype=dtype, device=path.device) for n, k, _ in shapes]
    given = [factors(randn, *shape, F32, path.device) for shape in shapes]

    def run(rounding):
        ws = [w.clone() for w in weights]
        lows = [remainder_like(w) for w in ws] if rounding == "remainder" else []
        delta_update_(ws, *zip(*given, strict=True), scale=0.1, rounding=rounding, seed=2,
                      remainder=lows or None, backend="triton")  # fmt: skip
        return ws + lows

    usual = {rounding: run(rounding) for rounding in roundings(dtype)}
    names = ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "TILES", "num_warps", "num_stages")
    other = replace(
        kernels.DELTA_UPDATE, default=lambda *_: dict(zip(names, (*blocks, 2, 4, 1), strict=True))
    )
    monkeypatch.setattr(kernels, "DELTA_UPDATE", other)
    for rounding, expected in usual.items():
        assert all(torch.equal(*ts) for ts in zip(run(rounding), expected, strict=True)), rounding


# --------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_no_host_synchronisation(randn):
    shapes = [(256, 512, 8), (129, 257, 4)]
    weights = [randn(n, k, dtype=BF16, device="cuda") for n, k, _ in shapes]
    given = list(zip(*(factors(randn, *shape, F32, "cuda") for shape in shapes), strict=True))
    lows = [remainder_like(w) for w in weights]
    step, apply = torch.tensor(3, device="cuda"), torch.tensor(True, device="cuda")

    def run(scale):
        for rounding in roundings(BF16):
            delta_update_(weights, *given, scale=scale, rounding=rounding, remainder=lows,
                          step=step, apply=apply, backend="triton")  # fmt: skip

    run(0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(0.1)
        run(0.2)  # a new table
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_runs_on_the_current_stream(randn):
    n, k, r = 2048, 2048, 8
    given = factors(randn, n, k, r, F32, "cuda")
    start = randn(n, k, dtype=BF16, device="cuda")
    expected = delta_update_(start.clone(), *given, scale=0.1, rounding="nearest")
    w = torch.zeros_like(start)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # had the kernel not waited, it would have seen zeros
        w.copy_(start)
        delta_update_(w, *given, scale=0.1, rounding="nearest", backend="triton")
    stream.synchronize()
    assert torch.equal(w, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs(randn):
    given = factors(randn, 96, 136, 4, F32, "cuda:1")
    w = randn(96, 136, dtype=BF16, device="cuda:1")
    expected = ref.delta_update_ref_(w.clone(), *given, scale=2.0**-6, rounding="nearest")
    delta_update_(w, *given, scale=2.0**-6, rounding="nearest", backend="triton")
    assert (w.float() - expected.float()).norm() < 1e-3 * expected.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
def test_more_than_2_31_elements(rounding, randint):
    n = k = 46400
    if torch.cuda.mem_get_info()[0] < 6 * n * k:
        pytest.skip("needs 13 GB of GPU memory")
    a, b, da, db = factors(randint, n, k, 2, F32, "cuda")
    w = torch.ones(n, k, dtype=BF16, device="cuda")
    low = remainder_like(w) if rounding == "remainder" else None
    delta_update_(w, a, b, da, db, scale=2.0**-10, rounding=rounding, remainder=low, seed=5,
                  step=1, backend="triton")  # fmt: skip
    expected = 1 + 2.0**-10 * (db[-3:] @ a + (b[-3:] - db[-3:]) @ da)
    if rounding == "remainder":
        assert torch.equal(ref.join_remainder(w[-3:], low[-3:]), expected)
    elif rounding == "nearest":
        assert torch.equal(w[-3:], expected.to(BF16))
    else:
        block = torch.arange((n - 3) * k // 8, n * k // 8, device="cuda")
        zero = torch.zeros_like(block)
        words = ref.philox4x32(block, zero, zero + 1, zero, 5)
        halves = torch.stack([h for word in words for h in (word & 0xFFFF, word >> 16)], 1)
        assert torch.equal(w[-3:], ref.round_stochastic(expected, halves.view(3, k), BF16))
