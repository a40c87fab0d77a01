"""Tensors of more than 2^31 elements: right at their beginning, around 2^31, and at their end.

Slices are compared with the reference; the whole would not fit beside the tensors themselves.
`tests/ops` has W of `delta_update_` and x of `lora_linear` past 2^31.
"""

import pytest
import torch
from delta_update_calls import factors, remainder_like
from lora_linear_calls import doubles, outputs
from op_paths import BF16, F32

from deltadiff import adamw_step_, delta_update_, lora_linear
from deltadiff.ops import reference as ref
from deltadiff.ops.backends import why_unavailable

GPU = torch.device("cuda", 0)
EDGE = 2**31


def needs(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:g} GB of GPU memory; {free / 1e9:.0f} are free")


def rows_to_look_at(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """The first and the last rows, those around element 2^31, and some others."""
    edge = EDGE // width
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(rows, (8,), generator=generator)
    wanted = torch.tensor([0, 1, edge - 1, edge, edge + 1, rows - 2, rows - 1])
    return torch.cat([wanted[wanted < rows], others]).unique().to(GPU)


@pytest.fixture(autouse=True)
def free_again():
    yield
    torch.cuda.empty_cache()


# ---------------------------------------------------------------- delta_update


@pytest.mark.gpu
@pytest.mark.parametrize("k", [46400, 46401], ids=["dense", "strided"])
@pytest.mark.parametrize("rounding", ["nearest", "remainder"])
def test_delta_update(rounding, k, randint):
    """Rows of a length that no block divides take the other way through the kernel."""
    n = 46400
    needs(10)
    a, b, da, db = factors(randint, n, k, 2, F32, GPU)
    w = torch.ones(n, k, dtype=BF16, device=GPU)
    low = remainder_like(w) if rounding == "remainder" else None
    delta_update_(w, a, b, da, db, scale=2.0**-10, rounding=rounding, remainder=low)
    rows = rows_to_look_at(n, k)
    expected = 1 + 2.0**-10 * (db[rows] @ a + (b[rows] - db[rows]) @ da)
    if low is None:
        assert torch.equal(w[rows], expected.to(BF16))
    else:
        assert torch.equal(ref.join_remainder(w[rows], low[rows]), expected)


@pytest.mark.gpu
def test_stochastic_bits_do_not_wrap(randint):
    """Random bits are those of the element's place in the whole W, on both sides of 2^31."""
    n, k, scale = 46400, 46400, 2.0**-10
    needs(6)
    a, b, da, db = factors(randint, n, k, 2, F32, GPU)
    w = torch.ones(n, k, dtype=BF16, device=GPU)
    delta_update_(w, a, b, da, db, scale=scale, rounding="stochastic", seed=5, step=1)
    for row in rows_to_look_at(n, k).tolist():
        block = torch.arange(row * k // 8, (row + 1) * k // 8, device=GPU)
        words = ref.philox4x32(block & ref.MASK32, block >> 32, 1, 0, 5)
        bits = torch.stack([h for word in words for h in (word & 0xFFFF, word >> 16)], 1).view(k)
        one = slice(row, row + 1)
        wide = 1 + scale * (db[one] @ a + (b[one] - db[one]) @ da)
        assert torch.equal(w[row], ref.round_stochastic(wide[0], bits, BF16)), row


# ----------------------------------------------------------------- lora_linear


def backends() -> list[str]:
    if not torch.cuda.is_available():
        return ["triton"]
    return ["triton"] + ([] if why_unavailable("hopper", GPU, BF16) else ["hopper"])


def numbers(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16, device=GPU).normal_(std=std)


def compare_rows(assert_close, ours, rows, given, names):
    """Rows of y and of dx, which depend on the same rows of x and dy alone."""
    x, w, a, b, dy = given
    part = x[rows].contiguous(), w, a, b, None, None, dy[rows].contiguous()
    eager, truth = outputs(ref.lora_linear_ref, *part), outputs(ref.lora_linear_ref, *doubles(part))
    for name in names:
        assert_close(ours[name][rows], eager[name], truth[name], 2 if name == "y" else 3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends())
def test_y_past_2_31(backend, assert_close):
    m, n, k, r = 1_050_000, 2104, 64, 8
    needs(30)
    x, w = numbers(m, k), numbers(n, k, std=k**-0.5)
    a, b, dy = numbers(r, k, std=k**-0.5), numbers(n, r, std=r**-0.5), numbers(m, n)
    ours = outputs(lora_linear, x, w, a, b, None, None, dy, backend=backend)
    given = x, w, a, b, dy
    compare_rows(assert_close, ours, rows_to_look_at(m, n), given, ("y", "x"))
    s = (x.double() @ a.double().T) * 0.7
    parts = zip(s.split(50_000), dy.split(50_000), strict=True)
    truth = sum(v.double().T @ u for u, v in parts)
    assert ((ours["lora_B"].double() - truth).norm() / truth.norm()).item() < 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("m", [40, 300])
def test_weight_past_2_31(backend, m, assert_close):
    n, k, r = 46400, 46400, 8
    needs(24)
    x, w = numbers(m, k), numbers(n, k, std=k**-0.5)
    a, b, dy = numbers(r, k, std=k**-0.5), numbers(n, r, std=r**-0.5), numbers(m, n, std=n**-0.5)
    ours = outputs(lora_linear, x, w, a, b, None, None, dy, backend=backend)
    columns = rows_to_look_at(n, k)
    part = x, w[columns], a, b[columns], None, None, dy[:, columns]
    eager, truth = outputs(ref.lora_linear_ref, *part), outputs(ref.lora_linear_ref, *doubles(part))
    assert_close(ours["y"][:, columns], eager["y"], truth["y"], 2)
    t = dy.double() @ b.double() * 0.7
    half = slice(k - 64, k)  # dx of the last columns, over all of W's rows
    wanted = dy.float() @ w[:, half].float() + (t @ a[:, half].double()).float()
    error = (ours["x"][:, half].float() - wanted).norm() / wanted.norm()
    assert error.item() < 2**-7


# ------------------------------------------------------------------ adamw_step


@pytest.mark.gpu
@pytest.mark.parametrize("odd", [0, 1], ids=["aligned", "not aligned"])
def test_adamw_step(odd, randn):
    """A parameter in bfloat16 with float32 moments: 12 bytes an element, 26 GB."""
    numel = EDGE + 4096 + odd
    needs(36)
    places = torch.cat([
        torch.arange(64), torch.arange(EDGE - 64, EDGE + 64), torch.arange(numel - 64, numel),
        torch.randint(numel, (256,), generator=torch.Generator().manual_seed(1)),
    ]).unique().to(GPU)  # fmt: skip
    param, grad = (torch.empty(numel, dtype=BF16, device=GPU).normal_() for _ in range(2))
    exp_avg, exp_avg_sq = (torch.full((numel,), v, device=GPU) for v in (0.1, 0.02))
    small = [t[places].clone() for t in (param, grad, exp_avg, exp_avg_sq)]
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.03, "weight_decay": 0.5}
    for tensors in ((param, grad, exp_avg, exp_avg_sq), small):
        adamw_step_(*([t] for t in tensors), torch.ones(1, device=GPU), **options)
    for ours, expected in zip((param, grad, exp_avg, exp_avg_sq), small, strict=True):
        assert torch.equal(ours[places], expected)
