"""The specification itself: known answers, exact inverses, and PyTorch's own functions."""

import pytest
import torch

from deltadiff.ops import reference as ref

DOUBLE = torch.float64


# ------------------------------------------------------------------- random bits


@pytest.mark.parametrize(
    "rounds, counter, seed, expected",
    [
        (10, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (7, 0, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        # All bits set. From the known-answer file of Random123, as are the two above.
        (10, 0xFFFFFFFF, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (7, 0xFFFFFFFF, -1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ],
)
def test_philox_known_answers(rounds, counter, seed, expected):
    c = torch.tensor(counter)
    words = ref.philox4x32(c, c, c, c, seed, rounds=rounds)
    assert " ".join(f"{w.item():08x}" for w in words) == expected


def test_random_bits_are_halves_of_the_words():
    bits = ref.random_bits(torch.Size((3, 7)), 5, 11, 2, "cpu").flatten()
    block = torch.tensor(1)  # elements 8 to 15
    words = ref.philox4x32(block, torch.tensor(0), torch.tensor(11), torch.tensor(2), 5)
    for i, word in enumerate(words):
        assert bits[8 + 2 * i] == word & 0xFFFF
        assert bits[9 + 2 * i] == word >> 16


def test_random_bits_depend_on_seed_step_and_index():
    shape = torch.Size((4, 16))
    draws = [
        ref.random_bits(shape, *where, "cpu")
        for where in ((0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for i, a in enumerate(draws):
        assert all((a != b).float().mean() > 0.9 for b in draws[:i])


# --------------------------------------------------------------------- roundings


def float32_patterns(n=20000):
    """Float32 values of random bits: every exponent, both signs, NaN and infinity among them."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(0))
    special = [0, -(2**31), 0x7F800000, -0x800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x7FC00000]
    return torch.cat([bits, torch.tensor(special)]).int().view(torch.float32)


def test_remainder_holds_every_float32_beside_bfloat16():
    wide = float32_patterns()
    high, low = ref.split_remainder(wide, torch.bfloat16)
    back = ref.join_remainder(high, low)
    number = ~wide.isnan()
    assert torch.equal(back[number].view(torch.int32), wide[number].view(torch.int32))
    assert back[~number].isnan().all()
    ordinary = wide.isfinite() & (wide.abs() < 2.0**127)
    half_ulp = (high.float() * 2.0**-8).abs()
    assert ((wide - high.float()).abs() <= half_ulp + 2.0**-133)[ordinary].all()


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_remainder_beside_float16_holds_float32_from_2_to_the_minus_16_to_65504():
    """Every exponent there, both signs, and both sides of every power of two."""
    powers = torch.cat([-(2.0 ** torch.arange(-16, 16)), 2.0 ** torch.arange(-16, 16)])
    near = (powers.view(torch.int32)[:, None] + torch.arange(-5000, 5000)).int().flatten()
    wide = torch.cat([near.view(torch.float32), float32_patterns(2**20), torch.tensor([65504.0])])
    wide = wide[(wide.abs() >= 2.0**-16) & (wide.abs() <= 65504)]
    high, low = ref.split_remainder(wide, torch.float16)
    assert torch.equal(high, wide.half()) and low.dtype == torch.int16
    assert same_bits(ref.join_remainder(high, low), wide)


def test_remainder_beside_a_tiny_float16_is_2_to_the_minus_40_off_at_most():
    wide = float32_patterns(2**20)
    wide = torch.cat([wide[wide.abs() < 2.0**-16], torch.tensor([0.0, -0.0, 2.0**-41])])
    joined = ref.join_remainder(*ref.split_remainder(wide, torch.float16))
    assert ((joined.double() - wide.double()).abs() <= 2.0**-40).all()
    assert same_bits(joined[-3:-1], wide[-3:-1])  # zeros keep their sign
    again = ref.join_remainder(*ref.split_remainder(joined, torch.float16))
    assert same_bits(again, joined)  # what is lost is lost once


def test_remainder_beside_float16_saturates_past_its_range():
    wide = torch.tensor([65510.0, 65520.0, 65535.0, 7e4, 3.4e38])
    for sign in (1, -1):
        high, low = ref.split_remainder(sign * wide, torch.float16)
        assert (high == sign * 65504).all() and low.dtype == torch.int16
        joined = sign * ref.join_remainder(high, low)
        assert torch.equal(joined[:3], wide[:3])  # the remainder reaches 32 further
        assert ((joined[3:] > 65535) & (joined[3:] <= 65536)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_remainder_keeps_what_is_not_finite(dtype):
    wide = torch.tensor([float("inf"), -float("inf"), float("nan")])
    high, low = ref.split_remainder(wide, dtype)
    joined = ref.join_remainder(high, low)
    assert torch.equal(joined[:2], wide[:2]) and joined[2].isnan()
    assert torch.equal(high.float()[:2], wide[:2]) and high[2].isnan() and not low.any()


@pytest.mark.parametrize("dtype, bits_used", [(torch.bfloat16, 16), (torch.float16, 13)])
@pytest.mark.parametrize(
    "value", [1.00123, -1.00123, 3.14159e-5, -0.75, 1e-7, 6.0e-8, 2.0**-24, 0.0, 65504.0]
)
def test_stochastic_goes_up_as_often_as_the_fraction_says(dtype, bits_used, value):
    """Over all values of the random bits, not a sample of them: the mean is the value itself."""
    wide = torch.full((2**16,), value)
    rounded = ref.round_stochastic(wide, torch.arange(2**16), dtype).double()
    low, high = rounded.min(), rounded.max()
    assert rounded.unique().numel() <= 2
    spacing = (high - low).item()
    assert abs(rounded.mean().item() - wide[0].double().item()) <= spacing * 2.0**-bits_used
    assert low <= wide[0] <= high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_keeps_what_is_not_finite(dtype):
    wide = torch.tensor([float("inf"), -float("inf"), float("nan")])
    bits = torch.tensor([0xFFFF] * 3)
    rounded = ref.round_stochastic(wide, bits, dtype).float()
    assert torch.equal(rounded[:2], wide[:2]) and rounded[2].isnan()


# -------------------------------------------------------------------- operations


@pytest.mark.parametrize("gate_shape", [None, (), (1,), (3,)])
def test_lora_linear_has_the_gradients_of_the_papers(gate_shape):
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(s, dtype=DOUBLE) for s in ((7, 5), (6, 5), (3, 5), (6, 3)))
    g = None if gate_shape is None else torch.randn(gate_shape, dtype=DOUBLE)
    dy, scaling = torch.randn(7, 6, dtype=DOUBLE), 1.7
    leaves = [t.requires_grad_() for t in (x, a, b) + (() if g is None else (g,))]
    y = ref.lora_linear_ref(x, w, a, b, scaling=scaling, gate=g)
    grads = torch.autograd.grad(y, leaves, dy)
    one = torch.ones(()) if g is None else g
    t, s = dy @ b, x @ a.T
    torch.testing.assert_close(grads[0], dy @ w + scaling * one * t @ a)
    torch.testing.assert_close(grads[1], (scaling * one * t).T @ x)
    torch.testing.assert_close(grads[2], scaling * dy.T @ (s * one))
    if g is not None:
        per_rank = scaling * (t * s).sum(0)
        torch.testing.assert_close(
            grads[3], per_rank if g.numel() > 1 else per_rank.sum().view(g.shape)
        )


def test_delta_update_is_the_difference_of_the_products():
    torch.manual_seed(0)
    w, a0, b0, a1, b1 = (
        torch.randn(s, dtype=DOUBLE) for s in ((6, 5), (2, 5), (6, 2), (2, 5), (6, 2))
    )
    expected = w + 0.3 * (b1 @ a1 - b0 @ a0)
    ref.delta_update_ref_(w, a1, b1, a1 - a0, b1 - b0, scale=0.3)
    torch.testing.assert_close(w, expected, rtol=1e-14, atol=1e-14)


def test_adamw_step_is_torchs_in_float64():
    torch.manual_seed(0)
    p = torch.randn(4, 3, dtype=DOUBLE)
    q = p.clone().requires_grad_()
    options = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([q], **options)
    m, v, step, delta = (
        torch.zeros_like(p),
        torch.zeros_like(p),
        torch.zeros(()),
        torch.zeros_like(p),
    )
    for t in range(1, 31):
        q.grad = torch.randn(4, 3, dtype=DOUBLE)
        optimizer.step()
        before = p.clone()
        ref.adamw_step_ref_(p, q.grad, m, v, step, delta=delta, **options)
        torch.testing.assert_close(p, q.detach(), rtol=1e-12, atol=1e-14)
        assert torch.equal(delta, p - before) and step == t
