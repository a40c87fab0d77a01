"""Dropout on the low-rank branch of `lora_linear`: the mask, and every backend against float64."""

import contextlib
import math

import pytest
import torch
from lora_linear_calls import doubles, kept_by, outputs

from deltadiff import lora_linear
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops import reference
from deltadiff.ops.reference import dropout_mask_ref, lora_linear_ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
P = 0.3


def inputs(make, m, k, n, r, dtype, device, adapter=None, gate=None, bias=True):
    """(x, weight, lora_A, lora_B, gate, bias, dy), the branch as large as the base."""
    adapter = adapter or dtype
    return [
        make(m, k, dtype=dtype, device=device),
        make(n, k, dtype=dtype, device=device) * k**-0.5,
        make(r, k, dtype=adapter, device=device) * k**-0.5,
        make(n, r, dtype=adapter, device=device) * r**-0.5,
        None if gate is None else make(*gate, dtype=F32, device=device),
        make(n, dtype=dtype, device=device) if bias else None,
        make(m, n, dtype=dtype, device=device),
    ]


def mask_of(path, dtype, m, k, seed, p=P, n=24, r=3):
    """The mask that a backend uses for dx, whose other factors are ones."""
    ones = [torch.ones(s, dtype=dtype, device=path.device) for s in ((m, k), (r, k), (n, r))]
    x, zero = ones[0].requires_grad_(), torch.zeros(n, k, dtype=dtype, device=path.device)
    y = lora_linear(
        x, zero, *ones[1:], scaling=1.0, dropout=p, seed=seed, backend=path.backend
    )  # fmt: skip
    (dx,) = torch.autograd.grad(y.sum(), x)
    return dx != 0


# ------------------------------------------------------------------------ the mask


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_that_is_left_out_and_independence(p):
    """Five standard deviations of the binomial, for the share and for products of neighbours."""
    rows, columns = 1024, 1024
    share = round(p * 65536) / 65536
    seeds = (7, 8, 7 + 2**32, -1)
    # Of variance 1 and mean 0 each, where the share is right; products of independent ones too.
    z = [
        (dropout_mask_ref((rows, columns), p, seed).double() - (1 - share))
        / math.sqrt(share * (1 - share))
        for seed in seeds
    ]
    pairs = [(a, b) for i, a in enumerate(z) for b in z[:i]]
    for mask in z:
        assert abs(mask.sum()) < 5 * math.sqrt(mask.numel())
        pairs += [(mask[:, lag:], mask[:, :-lag]) for lag in (1, 2, 3, 7, 8, 16)]
        pairs += [(mask[lag:], mask[:-lag]) for lag in (1, 2)]
        assert (mask.sum(0).abs() < 6 * math.sqrt(rows)).all()
        assert (mask.sum(1).abs() < 6 * math.sqrt(columns)).all()
    for a, b in pairs:
        assert abs((a * b).sum()) < 5 * math.sqrt(a.numel())


def test_mask_is_random_bits_against_a_threshold():
    bits = reference.random_bits(torch.Size((3, 16)), 5, 0, 0, "cpu")
    for p in (0.25, 0.1, 0.999):
        assert torch.equal(dropout_mask_ref((3, 16), p, 5), bits >= round(p * 65536))
    # A row of 13 takes as many bits as one of 16.
    assert torch.equal(dropout_mask_ref((3, 13), 0.5, 5), (bits >= 32768)[:, :13])
    assert torch.equal(dropout_mask_ref((3, 16), 0.5, torch.tensor(5)), bits >= 32768)
    assert reference.round_dropout(2.0**-18) == 0 and reference.round_dropout(0.25) == 0.25
    assert reference.round_dropout(1 - 2.0**-30) == 1 - 2.0**-16


@pytest.mark.parametrize("m, k", [(37, 65), (1, 4100), (200, 72), (70, 520)])
def test_mask_is_the_same_on_every_backend(path, dtype, m, k):
    for seed in (0, 2**40 + 3, -(2**63)):
        expected = dropout_mask_ref((m, k), P, seed).to(path.device)
        assert torch.equal(mask_of(path, dtype, m, k, seed), expected)


def test_mask_does_not_depend_on_blocks(path, randint, monkeypatch):
    """Small integers and p = 0.5: every product and sum is exact, so a mask that is wrong in one
    place shows in some output."""
    x, w, a, b, bias, dy = (
        randint(*s, device=path.device)
        for s in ((150, 200), (72, 200), (5, 200), (72, 5), (72,), (150, 72))
    )
    given = x, w, a, b, None, bias, dy
    options = {"scaling": 0.5, "dropout": 0.5, "seed": 9}
    expected = outputs(lora_linear_ref, *given, **options)
    for m, k in ((16, 16), (32, 64), (64, 32), (64, 64)):
        if path.backend == "triton":
            from deltadiff.kernels.runtime.tuned import LaunchConfig

            def choose(config, *_, m=m, k=k):
                sizes = {"M": m, "N": k, "K": k, "C": k, "R": 16}
                names = {"down": "MKR", "fwd": "MNKR", "wgrad": "MCR"}[config.op.rpartition("_")[2]]
                found = {f"BLOCK_SIZE_{name}": sizes[name] for name in names}
                return found | ({"GROUP_SIZE_M": 2} if "N" in names else {"splits": 3})

            monkeypatch.setattr(LaunchConfig, "choose", choose)
        found = outputs(lora_linear, *given, **options, backend=path.backend)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_mask_does_not_depend_on_how_much_is_handled_at_once(randint):
    """More than the C++ backend masks at a time, in rows and in columns."""
    x, w, a, b, dy = (randint(*s) for s in ((1100, 2048), (8, 2048), (2, 2048), (8, 2), (1100, 8)))
    given, options = (x, w, a, b, None, None, dy), {"scaling": 0.5, "dropout": 0.5, "seed": 9}
    expected = outputs(lora_linear_ref, *given, **options)
    found = outputs(lora_linear, *given, **options, backend="cpp")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ----------------------------------------------------------------------- the results


def test_the_equations_by_hand(randn):
    x, w, a, b, g, bias, dy = doubles(inputs(randn, 5, 13, 7, 3, F32, "cpu", gate=(3,)))
    s, seed = 0.7, 11
    p = round(P * 65536) / 65536
    m = dropout_mask_ref(x.shape, P, seed).double()
    assert 0 < m.sum() < m.numel()
    dropped = m * x / (1 - p)
    S, T = dropped @ a.T, dy @ b
    expected = {
        "y": x @ w.T + bias + s * (g * S) @ b.T,
        "x": dy @ w + m / (1 - p) * (s * (g * T) @ a),
        "lora_A": s * (g * T).T @ dropped,
        "lora_B": s * dy.T @ (g * S),
        "gate": s * (T * S).sum(0),
        "bias": dy.sum(0),
    }
    found = outputs(lora_linear, x, w, a, b, g, bias, dy, s, dropout=P, seed=seed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-13)


CASES = [  # tokens, in, out, r; gate, bias, adapters in float32
    ((1, 16, 24, 1), None, True, False),
    ((37, 129, 65, 3), (3,), False, False),
    ((70, 64, 72, 8), (8,), True, True),
    ((300, 72, 140, 64), None, True, False),
    ((17, 280, 270, 160), (160,), False, True),
]


def assert_like_the_reference(given, options, dtype, assert_close, backend=None):
    """y and gradients are close to the truth, and a second run gives the same bits."""
    ours, again = (outputs(lora_linear, *given, **options, backend=backend) for _ in range(2))
    eager = outputs(lora_linear_ref, *given, **options)
    truth = outputs(lora_linear_ref, *doubles(given), **options)
    for name, expected in truth.items():
        assert torch.equal(ours[name], again[name]), name
        assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3,
                     dtype if name == "gate" else None)  # fmt: skip


@pytest.mark.parametrize("shape, gate, bias, mixed", CASES, ids=lambda v: str(v).replace(" ", ""))
def test_output_and_gradients(path, dtype, shape, gate, bias, mixed, randn, assert_close):
    given = inputs(
        randn, *shape, dtype, path.device, F32 if mixed else dtype, gate=gate, bias=bias
    )  # fmt: skip
    options = {"dropout": P, "seed": 3}
    assert_like_the_reference(given, options, dtype, assert_close, path.backend)


def test_a_scalar_gate(path, randint):
    given = [randint(*s, device=path.device) for s in ((9, 16), (8, 16), (2, 16), (8, 2))]
    gate, dy = torch.tensor(2.0, device=path.device), randint(9, 8, device=path.device)
    options = {"scaling": 0.5, "dropout": 0.5, "seed": 9}
    expected = outputs(lora_linear_ref, *given, gate, None, dy, **options)
    found = outputs(lora_linear, *given, gate, None, dy, **options, backend=path.backend)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_strides_and_leading_shapes_do_not_matter(path, randn):
    x, w, a, b, _, bias, _ = inputs(randn, 24, 40, 16, 4, F32, path.device)
    x.requires_grad_()

    def run(x):
        return lora_linear(
            x, w, a, b, scaling=1.0, bias=bias, dropout=P, seed=4, backend=path.backend
        )  # fmt: skip

    y = run(x)
    others = run(x.T.contiguous().T), run(torch.cat([x, x], 1)[:, :40]), run(x.view(2, 3, 4, 40))
    for other in others:
        torch.testing.assert_close(other.view(y.shape), y)
        grads = [torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (other, y)]
        torch.testing.assert_close(*grads)


def test_a_seed_is_an_int_or_a_tensor(path, randn):
    x, w, a, b, _, _, _ = inputs(randn, 24, 40, 16, 4, F32, path.device)

    def run(seed, dropout=P):
        return lora_linear(
            x, w, a, b, scaling=1.0, dropout=dropout, seed=seed, backend=path.backend
        )  # fmt: skip

    for seed in (5, -7, 2**62):
        assert torch.equal(run(seed), run(torch.tensor(seed, device=path.device)))
    assert not torch.equal(run(5), run(6))
    assert not torch.equal(run(5), run(5 + 2**32))  # all of its 64 bits count
    plain = lora_linear(x, w, a, b, scaling=1.0, backend=path.backend)
    assert torch.equal(run(5, 0), plain) and torch.equal(run(5, 2.0**-20), plain)
    assert run(5, 0.9999999).isfinite().all()


def test_no_mask_is_kept_for_backward(path, randn):
    if path.backend == "reference":
        pytest.skip("the reference leaves it to PyTorch what is kept")
    given = inputs(randn, 24, 40, 16, 4, F32, path.device, gate=(4,))
    x, w, a, b, gate, bias, _ = (t.requires_grad_() for t in given)
    seed = torch.tensor(3, device=path.device)
    _, kept = kept_by(
        lora_linear, x, w.detach(), a, b, scaling=1.0, gate=gate, bias=bias, dropout=P, seed=seed,
        backend=path.backend,
    )  # fmt: skip
    shapes = [tuple(t.shape) for t in kept]
    assert sorted(shapes) == sorted([*(tuple(t.shape) for t in (x, w, a, b, gate, seed)), (24, 4)])


def test_a_seed_that_changed_before_backward_is_noticed(path, randn):
    x, w, a, b, _, _, _ = inputs(randn, 6, 16, 12, 2, F32, path.device)
    seed = torch.tensor(3, device=path.device)
    y = lora_linear(
        x.requires_grad_(), w, a, b, scaling=1.0, dropout=P, seed=seed, backend=path.backend
    )  # fmt: skip
    seed += 1
    noticed = pytest.raises(RuntimeError, match="modified by an inplace operation")
    if path.backend == "reference":
        noticed = contextlib.nullcontext()  # it made the mask in the forward pass, and keeps it
    with noticed:
        y.sum().backward()


@pytest.mark.parametrize(
    "change, argument, kind",
    [
        ({"dropout": -0.1}, "dropout", ArgumentError),
        ({"dropout": 1.0}, "dropout", ArgumentError),
        ({"dropout": 1}, "dropout", ArgumentError),
        ({"dropout": float("nan")}, "dropout", ArgumentError),
        ({"dropout": float("inf")}, "dropout", ArgumentError),
        ({"dropout": True}, "dropout", ArgumentTypeError),
        ({"dropout": "0.1"}, "dropout", ArgumentTypeError),
        ({"dropout": None}, "dropout", ArgumentTypeError),
        ({"seed": 1.0}, "seed", ArgumentTypeError),
        ({"seed": True}, "seed", ArgumentTypeError),
        ({"seed": None}, "seed", ArgumentTypeError),
        ({"seed": 2**63}, "seed", ArgumentError),
        ({"seed": torch.tensor(1.0)}, "seed", ArgumentTypeError),
        ({"seed": torch.tensor(1, dtype=torch.int32)}, "seed", ArgumentTypeError),
        ({"seed": torch.tensor([1])}, "seed", ArgumentError),
        ({"seed": torch.tensor(1, device="meta")}, "seed", ArgumentTypeError),
    ],
)
def test_bad_input_is_named(change, argument, kind):
    arguments = {
        "x": torch.zeros(4, 16), "weight": torch.zeros(12, 16), "lora_A": torch.zeros(2, 16),
        "lora_B": torch.zeros(12, 2), "scaling": 1.0, "dropout": 0.5, "seed": 0,
    }  # fmt: skip
    with pytest.raises(kind) as raised:
        lora_linear(**arguments | change)
    assert raised.value.argument == argument
    assert raised.value.accepted and raised.value.given


# ----------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_large_layers_on_a_gpu(dtype, randn, assert_close, gpu_path):
    for shape in ((1000, 1234, 777, 19), (4096, 2048, 1536, 16), (16, 4096, 4096, 24)):
        given = inputs(randn, *shape, dtype, "cuda", F32, gate=(shape[3],))
        options = {"dropout": 0.1, "seed": torch.tensor(2**40 + 1, device="cuda")}
        assert_like_the_reference(given, options, dtype, assert_close)
        m, k = shape[:2]
        assert torch.equal(
            mask_of(gpu_path, dtype, m, k, 7), dropout_mask_ref((m, k), P, 7, "cuda")
        )


@pytest.mark.gpu
def test_a_graph_reads_the_seed_at_each_replay(randn):
    given = inputs(randn, 512, 256, 128, 8, BF16, "cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    outputs(lora_linear, *given, dropout=P, seed=seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outputs(lora_linear, *given, dropout=P, seed=seed)
    for value in (3, 2**50):
        seed.fill_(value)
        graph.replay()
        expected = outputs(lora_linear, *given, dropout=P, seed=value)
        for name, t in expected.items():
            assert torch.equal(found[name], t), name
