"""`lora_linear` on every backend, against float64."""

import gc
import importlib
import itertools
import weakref

import pytest
import torch
from lora_linear_calls import assert_frozen_A_keeps_no_x, doubles, inputs, outputs
from torch.utils.checkpoint import checkpoint

from deltadiff import lora_linear
from deltadiff.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from deltadiff.ops.dispatch import keeps_x
from deltadiff.ops.reference import lora_linear_ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_the_native_extension_is_built():
    importlib.import_module("deltadiff._C")


CASES = [  # tokens, in, out, r, gate, bias, adapters in float32
    ((1, 16, 24, 1), None, True, False),
    ((37, 129, 65, 3), (3,), False, False),
    ((70, 64, 72, 8), None, True, True),
    ((150, 72, 140, 64), (64,), True, False),
    ((17, 280, 270, 260), (260,), False, True),
]


@pytest.mark.parametrize("shape, gate, bias, mixed", CASES, ids=lambda v: str(v).replace(" ", ""))
def test_output_and_gradients(path, dtype, shape, gate, bias, mixed, randn, assert_close):
    adapter = F32 if mixed else dtype
    given = inputs(randn, *shape, dtype, path.device, adapter, gate, bias)
    ours = outputs(lora_linear, *given, backend=path.backend)
    eager = outputs(lora_linear_ref, *given)
    truth = outputs(lora_linear_ref, *doubles(given))
    assert ours["y"].dtype == dtype and ours["lora_A"].dtype == ours["lora_B"].dtype == adapter
    for name, expected in truth.items():
        # The gate's gradient is a float32 number made of numbers in the dtype of x.
        assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3,
                     dtype if name == "gate" else None)  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradient_of_a_scalar_gate(path, dtype, shape, randn, assert_close):
    found, eager, truth = [], [], []
    for _ in range(12):  # the error of one number is luck
        given = inputs(randn, 20, 24, 18, 4, dtype, path.device, gate=shape)
        found.append(outputs(lora_linear, *given, backend=path.backend)["gate"])
        eager.append(outputs(lora_linear_ref, *given)["gate"])
        truth.append(outputs(lora_linear_ref, *doubles(given))["gate"])
        assert found[-1].shape == shape and found[-1].dtype == F32
    assert_close(*map(torch.stack, (found, eager, truth)), 3, dtype)


def test_a_zero_gate_leaves_the_base_layer(path, dtype, randn):
    x, w, a, b, _, _, _ = inputs(randn, 9, 32, 24, 4, dtype, path.device)
    zero = torch.zeros((), device=path.device)
    gated = lora_linear(x, w, a, b, scaling=3.0, gate=zero, backend=path.backend)
    without = lora_linear(x, w, a, torch.zeros_like(b), scaling=3.0, backend=path.backend)
    assert torch.equal(gated, without)


@pytest.mark.parametrize("odd", ["x", "lora_A", "lora_B", "gate", "scalar gate", "dy"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_infinities_are_where_eager_has_them(path, dtype, tokens, odd, randint):
    """Kernels pad tiles with zeros, and split sums: neither may turn an infinity into NaN."""

    def exact(*shape, scale=1.0, **where):  # no sum has a sign that rounding decides
        return randint(*shape, **where)

    gate = () if odd == "scalar gate" else (3,)
    given = inputs(exact, tokens, 1024, 24, 3, dtype, path.device, gate=gate)
    names = ("x", "weight", "lora_A", "lora_B", "gate", "bias", "dy")
    given[names.index(odd.split()[-1])].view(-1)[0] = torch.inf
    found = outputs(lora_linear, *given, scaling=0.5, backend=path.backend)
    for name, expected in outputs(lora_linear_ref, *given, scaling=0.5).items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found[name]), kind(expected)), name


@pytest.mark.parametrize("odd", ["x", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("zero", ["scaling", "scalar gate", "gate", "one of the gates"])
def test_nothing_times_infinity_is_where_eager_has_it(path, dtype, zero, odd, randint):
    """0 inf and 0 NaN are NaN: a branch that is scaled by 0 does not hide what broke in it."""

    def exact(*shape, scale=1.0, **where):
        return randint(*shape, **where)

    gate = {"scaling": None, "scalar gate": ()}.get(zero, (3,))
    scaling = 0.0 if zero == "scaling" else 0.5
    for tokens, value in itertools.product((1, 20), (torch.inf, torch.nan)):
        given = inputs(exact, tokens, 72, 24, 3, dtype, path.device, gate=gate)
        if gate is not None:
            given[4].view(-1)[: 1 if zero == "one of the gates" else 3].zero_()
        names = ("x", "weight", "lora_A", "lora_B", "gate", "bias", "dy")
        given[names.index(odd)].view(-1)[0] = value
        found = outputs(lora_linear, *given, scaling=scaling, backend=path.backend)
        for name, expected in outputs(lora_linear_ref, *given, scaling=scaling).items():
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(found[name]), kind(expected)), (name, tokens, value)


@pytest.mark.parametrize(
    "what", ["x", "x_columns", "weight", "adapters", "dy", "dy_expanded", "gate"]
)
def test_strides(path, dtype, what, randn, assert_close):
    given = inputs(randn, 40, 56, 48, 5, dtype, path.device, gate=(5,), bias=True)
    x, w, a, b, gate, bias, dy = given

    def transposed(t):
        return t.T.contiguous().T

    if what == "x":
        x = transposed(x)
    elif what == "x_columns":
        x = torch.cat([x, x], 1)[:, 3:59]
    elif what == "weight":
        w = transposed(w)
    elif what == "adapters":
        a, b = transposed(a), transposed(b)
    elif what == "dy":
        dy = transposed(dy)
    elif what == "dy_expanded":
        dy = torch.ones((), dtype=dtype, device=path.device).expand(40, 48)
    else:
        gate = torch.stack([gate, gate], 1)[:, 0]
        bias = torch.stack([bias, bias], 1)[:, 0]
    given = x, w, a, b, gate, bias, dy
    ours = outputs(lora_linear, *given, backend=path.backend)
    eager, truth = outputs(lora_linear_ref, *given), outputs(lora_linear_ref, *doubles(given))
    for name, expected in truth.items():
        assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3,
                     dtype if name == "gate" else None)  # fmt: skip


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_shapes(path, leading, randn):
    x = randn(*leading, 16, device=path.device).requires_grad_()
    _, w, a, b, _, _, _ = inputs(randn, 1, 16, 12, 2, F32, path.device)
    a.requires_grad_()
    y = lora_linear(x, w, a, b, scaling=1.0, backend=path.backend)
    assert y.shape == (*leading, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape and a.grad.shape == a.shape
    if 0 in leading:
        assert not a.grad.any()
    else:
        flat = lora_linear(x.detach().reshape(-1, 16), w, a, b, scaling=1.0, backend=path.backend)
        assert torch.equal(flat.view(y.shape), y)


def test_two_runs_are_bit_equal(path, dtype, randn):
    given = inputs(randn, 300, 600, 40, 8, dtype, path.device, gate=(8,), bias=True)
    first, second = (outputs(lora_linear, *given, backend=path.backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "gate", "bias"])
def test_only_what_is_asked_for_gets_a_gradient(path, wanted, randn):
    x, w, a, b, gate, bias, dy = inputs(randn, 6, 16, 12, 2, F32, path.device, gate=(), bias=True)
    names = {"x": x, "weight": w, "lora_A": a, "lora_B": b, "gate": gate, "bias": bias}
    everything = outputs(lora_linear, x, w, a, b, gate, bias, dy, backend=path.backend)
    names["weight"].requires_grad_()  # asks in vain
    names[wanted].requires_grad_()
    y = lora_linear(x, w, a, b, scaling=0.7, gate=gate, bias=bias, backend=path.backend)
    y.backward(dy)
    assert torch.equal(names[wanted].grad, everything[wanted])
    assert all(t.grad is None for name, t in names.items() if name != wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_a_frozen_A_keeps_no_activation(path, leading, dropout, randn):
    if path.backend == "reference":
        pytest.skip("the reference leaves it to PyTorch what is kept")
    x, w, a, b, gate, bias, dy = inputs(randn, 6, 16, 12, 2, F32, path.device, gate=(2,), bias=True)
    given = x.view(*leading, 16), w, a, b, gate, bias, dy.view(*leading, 12)
    trained = ["x", "lora_B", "bias"]
    if not keeps_x(path.backend, need_A=False, need_gate=True):
        trained.append("gate")
    extra = dict(backend=path.backend, dropout=dropout, seed=3)
    assert_frozen_A_keeps_no_x(given, trained, **extra)


def test_a_weight_that_changed_before_backward_is_noticed(path, randn):
    x, w, a, b, _, _, _ = inputs(randn, 6, 16, 12, 2, F32, path.device)
    y = lora_linear(x.requires_grad_(), w, a, b, scaling=0.7, backend=path.backend)
    w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inputs_are_kept(path, dtype, randn):
    given = inputs(randn, 10, 32, 24, 4, dtype, path.device, gate=(4,), bias=True)
    before = [t.clone() for t in given]
    outputs(lora_linear, *given, backend=path.backend)
    assert all(torch.equal(t, old) for t, old in zip(given, before, strict=True))


def test_autocast(path, randn, assert_close):
    compute = F16 if path.backend == "triton" else BF16
    x, w, a, b, _, bias, dy = inputs(randn, 20, 32, 24, 4, F32, path.device, bias=True)
    dy = dy.to(compute)
    with torch.autocast(path.device.type, compute):
        ours = outputs(lora_linear, x, w, a, b, None, bias, dy, backend=path.backend)
    halves = [t.to(compute) for t in (x, w, a, b)]
    eager = outputs(lora_linear_ref, *halves, None, bias.to(compute), dy)
    truth = outputs(lora_linear_ref, *doubles([x, w, a, b, None, bias, dy]))
    assert ours["y"].dtype == compute
    assert {ours[name].dtype for name in ("x", "lora_A", "lora_B", "bias")} == {F32}
    for name, expected in truth.items():
        assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3, compute)


@pytest.mark.parametrize("gate", [None, (), (3,)])
def test_gradcheck_in_float64(gate, randn):
    given = inputs(randn, 4, 6, 5, 3, torch.float64, "cpu", gate=gate, bias=True)
    x, w, a, b, g, bias, _ = doubles(given)
    leaves = [t.requires_grad_() for t in (x, a, b, bias) + (() if g is None else (g,))]

    def run(x, a, b, bias, g=None):
        return lora_linear(x, w, a, b, scaling=0.3, gate=g, bias=bias)

    assert torch.autograd.gradcheck(run, leaves)


def test_a_large_sum_is_split_the_same_for_every_batch(path, randn):
    """One token alone and among others: the same number, to the rounding of the sum."""
    _, w, a, b, _, _, _ = inputs(randn, 1, 2100, 16, 8, F32, path.device)
    x = randn(5, 2100, device=path.device)
    together = lora_linear(x, w, a, b, scaling=1.0, backend=path.backend)
    alone = lora_linear(x[2:3], w, a, b, scaling=1.0, backend=path.backend)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-5)


def test_offsets_of_64_bits(path, dtype, randn, monkeypatch):
    """What strides too large for a test would take: the same kernels with wider offsets."""
    if path.backend != "triton":
        pytest.skip("the Triton kernels alone have offsets of two widths")
    import triton.language as tl

    from deltadiff.kernels.lora_linear import few_tokens, portable

    given = inputs(randn, 40, 56, 48, 5, dtype, path.device, gate=(5,), bias=True)
    expected = outputs(lora_linear, *given, backend="triton")
    for kernels in (few_tokens, portable):
        monkeypatch.setattr(kernels, "index_type", lambda *_: tl.int64)
    found = outputs(lora_linear, *given, backend="triton")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "change, argument, kind",
    [
        ({"x": torch.zeros(4, 15)}, "x", ArgumentError),
        ({"x": torch.zeros(4, 16, dtype=F16)}, "x", ArgumentTypeError),
        ({"x": torch.zeros(4, 16, dtype=torch.int64)}, "x", ArgumentTypeError),
        ({"x": [1.0]}, "x", ArgumentTypeError),
        ({"weight": torch.zeros(12, 16, device="meta")}, "weight", ArgumentTypeError),
        ({"weight": torch.zeros(12)}, "weight", ArgumentError),
        ({"weight": torch.zeros(0, 16)}, "weight", ArgumentError),
        ({"lora_A": torch.zeros(0, 16), "lora_B": torch.zeros(12, 0)}, "lora_A", ArgumentError),
        ({"lora_A": torch.zeros(2, 15)}, "lora_A", ArgumentError),
        ({"lora_A": torch.zeros(2, 16, dtype=BF16)}, "lora_A", ArgumentTypeError),
        ({"lora_B": torch.zeros(12, 3)}, "lora_B", ArgumentError),
        ({"lora_B": torch.zeros(12, 2, dtype=BF16)}, "lora_B", ArgumentTypeError),
        ({"gate": torch.zeros(3)}, "gate", ArgumentError),
        ({"gate": 1.0}, "gate", ArgumentTypeError),
        ({"bias": torch.zeros(11)}, "bias", ArgumentError),
        ({"bias": torch.zeros(12, dtype=F16)}, "bias", ArgumentTypeError),
        ({"scaling": float("nan")}, "scaling", ArgumentError),
        ({"scaling": "2"}, "scaling", ArgumentTypeError),
        ({"backend": "cuda"}, "backend", ArgumentError),
    ],
)
def test_bad_input_is_named(change, argument, kind):
    arguments = {
        "x": torch.zeros(4, 16), "weight": torch.zeros(12, 16), "lora_A": torch.zeros(2, 16),
        "lora_B": torch.zeros(12, 2), "scaling": 1.0,
    }  # fmt: skip
    with pytest.raises(kind) as raised:
        lora_linear(**arguments | change)
    assert raised.value.argument == argument
    assert raised.value.accepted and raised.value.given


def test_float64_has_no_fast_backend(path):
    if path.backend == "reference":
        pytest.skip("float64 goes to the reference")
    x = torch.zeros(1, 4, dtype=torch.float64, device=path.device)
    a, b = x.expand(2, 4), x.new_zeros(3, 2)
    with pytest.raises(BackendUnavailableError, match="float64"):
        lora_linear(x, x.expand(3, 4), a, b, scaling=1.0, backend=path.backend)


# --------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_large_layers_on_a_gpu(dtype, randn, assert_close):
    for shape in ((1000, 1234, 777, 19), (4096, 2048, 1536, 16), (16, 4096, 4096, 24)):
        given = inputs(randn, *shape, dtype, "cuda", F32, gate=(shape[3],), bias=True)
        ours, again = (outputs(lora_linear, *given, backend="triton") for _ in range(2))
        eager, truth = outputs(lora_linear_ref, *given), outputs(lora_linear_ref, *doubles(given))
        for name, expected in truth.items():
            assert torch.equal(ours[name], again[name]), name
            assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3,
                         dtype if name == "gate" else None)  # fmt: skip


@pytest.mark.gpu
def test_tf32_is_used_only_where_pytorch_may(randn):
    given = inputs(randn, 256, 512, 256, 16, F32, "cuda")
    truth = outputs(lora_linear_ref, *doubles(given))["y"]
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            y = outputs(lora_linear, *given, backend="triton")["y"].double()
            errors[allowed] = ((y - truth).norm() / truth.norm()).item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert errors[False] < 1e-6 < 1e-5 < errors[True] < 2e-3


@pytest.mark.gpu
def test_runs_on_the_current_stream(randn):
    given = inputs(randn, 4096, 4096, 4096, 16, BF16, "cuda")
    expected = outputs(lora_linear, *given, backend="triton")
    source, x = given[0].clone(), torch.zeros_like(given[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # had the kernels not waited, they would have read zeros
        x.copy_(source)
        found = outputs(lora_linear, x, *given[1:], backend="triton")
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs(randn):
    given = inputs(randn, 64, 96, 80, 8, BF16, "cuda:0")
    expected = outputs(lora_linear, *given, backend="triton")
    moved = [None if t is None else t.to("cuda:1") for t in given]
    found = outputs(lora_linear, *moved, backend="triton")
    for name, value in expected.items():
        assert found[name].device.index == 1
        assert torch.equal(found[name].to("cuda:0"), value), name


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_more_than_2_31_elements(transposed, randn, assert_close):
    m, k = 1_050_000, 2100
    if torch.cuda.mem_get_info()[0] < 14 * m * k:
        pytest.skip("needs 31 GB of GPU memory")
    _, w, a, b, _, _, _ = inputs(randn, 1, k, 16, 8, BF16, "cuda")
    x = torch.empty((k, m) if transposed else (m, k), dtype=BF16, device="cuda").normal_()
    x = x.T if transposed else x
    dy = randn(m, 16, dtype=BF16, device="cuda")
    ours = outputs(lora_linear, x, w, a, b, None, None, dy, backend="triton")
    last = [t[-1000:].contiguous() for t in (x, dy)]
    ends = last[0], w, a, b, None, None, last[1]
    eager, truth = outputs(lora_linear_ref, *ends), outputs(lora_linear_ref, *doubles(ends))
    assert_close(ours["y"][-1000:], eager["y"], truth["y"], 2)
    assert_close(ours["x"][-1000:], eager["x"], truth["x"], 3)
    t = dy.double() @ b.double() * 0.7
    truth_a = sum(s.T @ v.double() for s, v in zip(t.split(50_000), x.split(50_000), strict=True))
    assert ((ours["lora_A"].double() - truth_a).norm() / truth_a.norm()).item() < 2**-8


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_no_activation_alive(path, reentrant, randn):
    """Not until Python's collector comes by: recomputing ends in an exception, which holds frames
    and so their tensors where one of them holds it."""
    x, w, a, b, _, _, _ = inputs(randn, 8, 16, 12, 4, F32, path.device)
    x.requires_grad_(), a.requires_grad_()
    made = []

    def block(x):
        hidden = x.sin()
        made.append(weakref.ref(hidden))
        return lora_linear(hidden, w, a, b, scaling=2.0, backend=path.backend)

    gc.collect()
    gc.disable()
    try:
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        assert len(made) == 2 and not any(ref() is not None for ref in made)
    finally:
        gc.enable()
