"""`adamw_step_` on every backend, against `torch.optim.AdamW` and float64."""

import pytest
import torch

from deltadiff import adamw_step_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops import reference as ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Triton's interpreter computes with NumPy, which warns of what GPUs do quietly.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
SHAPES = [(3, 5), (64, 40), (2000,), (1,), (0,), (8, 16)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


class Tensors:
    """Parameters and all that a step takes, on one path."""

    def __init__(self, path, dtype, randn, shapes=SHAPES, moments=None):
        self.path, self.dtype, self.randn, self.shapes = path, dtype, randn, shapes
        self.params = self.make()
        zeros = [torch.zeros_like(p, dtype=moments or F32) for p in self.params]
        self.exp_avgs, self.exp_avg_sqs = zeros, [z.clone() for z in zeros]
        self.steps = torch.zeros(len(shapes), device=path.device)
        self.deltas = [torch.full_like(p, 5.0, dtype=F32) for p in self.params]

    def make(self):
        return [self.randn(*s, dtype=self.dtype, device=self.path.device) for s in self.shapes]

    def step(self, grads, **kwargs):
        kwargs = OPTIONS | {"deltas": self.deltas, "backend": self.path.backend} | kwargs
        adamw_step_(self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **kwargs)

    def state(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, self.steps]

    def snapshot(self):
        return [t.clone() for t in self.state()]

    def scalar(self, value, dtype=F32, shape=()):
        return torch.full(shape, value, dtype=dtype, device=self.path.device)


def equal(tensors, others):
    return all(torch.equal(t, other) for t, other in zip(tensors, others, strict=True))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("moments_like_params", [False, True])
def test_fifty_steps_are_those_of_torch(path, dtype, moments_like_params, randn, assert_close):
    if dtype == F16 and moments_like_params:
        pytest.skip("eps and small squares vanish in float16, in PyTorch too")
    ours = Tensors(path, dtype, randn, moments=dtype if moments_like_params else F32)
    start = flat(ours.params).double()
    eager = [p.clone().requires_grad_() for p in ours.params]
    truth = [p.double().requires_grad_() for p in ours.params]
    optimizers = [torch.optim.AdamW(ps, **OPTIONS) for ps in (eager, truth)]
    for _ in range(50):
        grads = ours.make()
        for ps in (eager, truth):
            for p, g in zip(ps, grads, strict=True):
                p.grad = g.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
        before = [p.clone() for p in ours.params]
        ours.step(grads)
        for p, old, delta in zip(ours.params, before, ours.deltas, strict=True):
            assert torch.equal(delta, p.float() - old.float())
    assert (ours.steps == 50).all()
    expected = flat(truth).detach().double()
    assert_close(flat(ours.params), flat(eager), expected, 2)
    if dtype == F32:  # the sum of the steps, which the parameters' own size would hide
        moved = expected - start
        found, theirs = flat(ours.params).double() - start, flat(eager).double() - start
        assert (found - moved).norm() <= 2 * (theirs - moved).norm() + 2.0**-24 * start.norm()


@pytest.mark.parametrize("done", [0, 1, 9, 999, 9999, 10_000_000])
def test_bias_correction_at_any_step(path, dtype, done, randn):
    ours = Tensors(path, dtype, randn, shapes=[(40, 50)])
    ours.params[0].mul_(2.0**-10)  # small beside the step, so that an error of the step shows
    ours.exp_avgs[0].copy_(randn(40, 50))
    ours.exp_avg_sqs[0].copy_(randn(40, 50).abs())
    ours.steps.fill_(done)
    grads = ours.make()
    doubles = [t[0].double() for t in (ours.params, grads, ours.exp_avgs, ours.exp_avg_sqs)]
    options = OPTIONS | {"betas": (0.9, 0.999)}
    old = doubles[0].clone()
    ref.adamw_step_ref_(*doubles, ours.steps[0].double(), **options)
    ours.step(grads, **options)
    step, moved = doubles[0] - old, ours.params[0].double() - old
    # One rounding of p to its dtype, and two float32 ones of the step.
    kind = torch.finfo(dtype)
    rounding = (doubles[0].abs() + kind.smallest_normal) * kind.eps / 2
    assert (moved - step).norm() <= rounding.norm() + step.norm() * 2.0**-23
    torch.testing.assert_close(ours.exp_avgs[0].double(), doubles[2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.exp_avg_sqs[0].double(), doubles[3], rtol=1e-6, atol=1e-7)


def test_each_tensor_has_its_own_step_count(path, randn):
    together = Tensors(path, F32, randn, shapes=[(6, 8)] * 3)
    for p in together.params:
        p.copy_(together.params[0])
    grad = together.make()[0]
    together.steps.copy_(torch.tensor([0.0, 5.0, 100.0]))
    together.step([grad] * 3)
    assert together.steps.tolist() == [1, 6, 101]
    a, b, c = together.params
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_a_list_is_its_tensors_one_by_one(path, dtype, randn):
    together, grads = Tensors(path, dtype, randn), None
    apart = [Tensors(path, dtype, randn, shapes=[s]) for s in SHAPES]
    for one, p in zip(apart, together.params, strict=True):
        one.params[0].copy_(p)
    for _ in range(2):
        grads = together.make()
        together.step(grads)
        for one, g in zip(apart, grads, strict=True):
            one.step([g])
    for i, one in enumerate(apart):
        assert torch.equal(one.params[0], together.params[i])
        assert torch.equal(one.exp_avg_sqs[0], together.exp_avg_sqs[i])
        assert torch.equal(one.deltas[0], together.deltas[i])


def test_many_tensors(path, randn):
    """More than the kernel finds its way among in one look."""
    ours = Tensors(path, F32, randn, shapes=[(1 + i % 3,) for i in range(300)])
    start, grads = flat(ours.params), ours.make()
    ours.step(grads, lr=1.0, weight_decay=0.0)  # the first step is the sign of the gradient
    torch.testing.assert_close(flat(ours.params), start - flat(grads).sign(), rtol=0, atol=1e-3)


def test_two_runs_are_bit_equal(path, dtype, randn):
    ours = Tensors(path, dtype, randn)
    grads, start = ours.make(), ours.snapshot()
    ours.step(grads)
    first = ours.snapshot()
    for t, old in zip(ours.state(), start, strict=True):
        t.copy_(old)
    ours.step(grads)
    assert equal(ours.state(), first)


def test_gradients_of_any_strides(path, dtype, randn):
    ours, other = (Tensors(path, dtype, randn, shapes=[(12, 16)]) for _ in range(2))
    other.params[0].copy_(ours.params[0])
    grad = ours.make()[0]
    ours.step([grad])
    other.step([grad.T.contiguous().T])
    assert equal(ours.state(), other.state())
    ours.step([torch.ones_like(grad)])
    other.step([torch.ones((), dtype=dtype, device=path.device).expand(12, 16)])
    assert equal(ours.state(), other.state())


def test_deltas_and_anchors_may_be_left_out(path, randn):
    ours, other = Tensors(path, F32, randn), Tensors(path, F32, randn)
    for p, q in zip(ours.params, other.params, strict=True):
        q.copy_(p)
    grads = ours.make()
    some = [None if i % 2 else d for i, d in enumerate(ours.deltas)]
    ours.step(grads, deltas=some, anchors=[None] * len(SHAPES), anchor_now=ours.scalar(1.0))
    other.step(grads, deltas=None)
    assert equal(ours.state(), other.state())
    for i, delta in enumerate(ours.deltas):
        assert (delta == 5).all() if i % 2 else not (delta == 5).any()


@pytest.mark.parametrize("flag", [True, 1, 2.5])
def test_anchors_take_the_values_before_the_step(path, dtype, flag, randn):
    ours = Tensors(path, dtype, randn)
    anchors = [torch.zeros_like(p) if i != 1 else None for i, p in enumerate(ours.params)]
    kind = {bool: torch.bool, int: torch.int64, float: F32}[type(flag)]
    for now in (None, ours.scalar(0, kind)):
        ours.step(ours.make(), anchors=anchors, anchor_now=now)
        assert not any(t.any() for t in anchors if t is not None)
    before = [p.clone() for p in ours.params]
    ours.step(ours.make(), anchors=anchors, anchor_now=ours.scalar(flag, kind))
    for t, old in zip(anchors, before, strict=True):
        assert t is None or torch.equal(t, old)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_found_inf_changes_nothing_but_deltas(path, dtype, shape, randn):
    ours = Tensors(path, dtype, randn)
    ours.step(ours.make())
    grads = [torch.full_like(p, float("nan")) for p in ours.params]
    anchors = [torch.full_like(p, 3.0) for p in ours.params]
    before = ours.snapshot()
    ours.step(grads, found_inf=ours.scalar(1.0, shape=shape), anchors=anchors,
              anchor_now=ours.scalar(1.0))  # fmt: skip
    assert equal(ours.state(), before)
    assert not any(d.any() for d in ours.deltas)
    assert all((t == 3).all() for t in anchors)

    grads = ours.make()
    ours.step(grads, found_inf=ours.scalar(0.0, shape=shape))
    after = ours.snapshot()
    for t, old in zip(ours.state(), before, strict=True):
        t.copy_(old)
    ours.step(grads)
    assert equal(ours.state(), after)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradients_are_divided_by_grad_scale(path, dtype, shape, randn):
    ours, other = Tensors(path, dtype, randn), Tensors(path, dtype, randn)
    for p, q in zip(ours.params, other.params, strict=True):
        q.copy_(p)
    grads = other.make()
    scaled = [g * 256 for g in grads]
    kept = [g.clone() for g in scaled]
    ours.step(scaled, grad_scale=ours.scalar(256.0, shape=shape))
    other.step(grads)
    assert equal(ours.state(), other.state())
    assert equal(scaled, kept)


@pytest.mark.parametrize(
    "change", [{"betas": (0.0, 0.0)}, {"lr": 0.0}, {"weight_decay": 0.0}, {"eps": 0.0}], ids=str
)
def test_limits_of_the_options(path, change, randn, assert_close):
    ours = Tensors(path, F32, randn, shapes=[(20, 30)])
    q = ours.params[0].double().requires_grad_()
    eager = ours.params[0].clone().requires_grad_()
    optimizers = [torch.optim.AdamW([t], **OPTIONS | change) for t in (q, eager)]
    for _ in range(3):
        grads = ours.make()
        q.grad, eager.grad = grads[0].double(), grads[0]
        for optimizer in optimizers:
            optimizer.step()
        ours.step(grads, **change)
    assert_close(ours.params[0], eager, q.detach(), 2)


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "change, argument, kind",
    [
        ({"grads": [torch.ones(4, 2)]}, "grads", ArgumentError),
        ({"grads": [torch.ones(4, 2), torch.ones(4, 3)]}, "grads", ArgumentError),
        ({"grads": [torch.ones(4, 2), None]}, "grads", ArgumentTypeError),
        ({"grads": [torch.ones(4, 2, dtype=BF16)] * 2}, "grads", ArgumentTypeError),
        ({"exp_avgs": [torch.ones(4, 2, dtype=F16)] * 2}, "exp_avgs", ArgumentTypeError),
        ({"exp_avg_sqs": [torch.ones(4, 2), torch.ones(2, 4).T]}, "exp_avg_sqs", ArgumentError),
        ({"params": [torch.ones(4, 2), torch.ones(4, 2, dtype=BF16)]}, "params", ArgumentTypeError),
        ({"params": [torch.ones(4, 2), torch.ones(2, 4).T]}, "params", ArgumentError),
        ({"params": [torch.ones(4, 2), "p"]}, "params", ArgumentTypeError),
        ({"steps": torch.zeros(3)}, "steps", ArgumentError),
        ({"steps": torch.zeros(2, dtype=torch.int64)}, "steps", ArgumentTypeError),
        ({"lr": float("nan")}, "lr", ArgumentError),
        ({"lr": -1.0}, "lr", ArgumentError),
        ({"betas": (0.9, 1.0)}, "betas", ArgumentError),
        ({"betas": 0.9}, "betas", ArgumentTypeError),
        ({"eps": -1e-8}, "eps", ArgumentError),
        ({"weight_decay": float("inf")}, "weight_decay", ArgumentError),
        ({"deltas": [torch.ones(4, 2, dtype=BF16)] * 2}, "deltas", ArgumentTypeError),
        ({"anchors": [torch.ones(4, 3)] * 2}, "anchors", ArgumentError),
        ({"grad_scale": torch.ones(2)}, "grad_scale", ArgumentError),
        ({"found_inf": torch.tensor(True)}, "found_inf", ArgumentTypeError),
        ({"backend": "cuda"}, "backend", ArgumentError),
    ],
)
def test_bad_input_is_named_and_nothing_changed(change, argument, kind):
    arguments = {
        "params": [torch.ones(4, 2) for _ in range(2)], "grads": [torch.ones(4, 2)] * 2,
        "exp_avgs": [torch.ones(4, 2) for _ in range(2)],
        "exp_avg_sqs": [torch.ones(4, 2) for _ in range(2)],
        "steps": torch.zeros(2), "lr": 1e-2,
    } | change  # fmt: skip
    with pytest.raises(kind) as raised:
        adamw_step_(**arguments)
    assert raised.value.argument == argument
    changed = [*arguments["params"], *arguments["exp_avgs"], *arguments["exp_avg_sqs"]]
    assert all((t == 1).all() for t in changed if isinstance(t, torch.Tensor))
    assert not arguments["steps"].any()


# --------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_no_host_synchronisation(gpu_path, randn):
    ours = Tensors(gpu_path, F32, randn, shapes=[(64, 40), (7,)])
    flags = {name: ours.scalar(1.0) for name in ("anchor_now", "grad_scale")}
    flags["found_inf"] = ours.scalar(0.0, shape=(1,))
    anchors = [p.clone() for p in ours.params]
    first, second = ours.make(), ours.make()  # other pointers: a new table
    ours.step(first, anchors=anchors, **flags)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(first, anchors=anchors, **flags)
        ours.step(second, anchors=anchors, **flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ours.steps.tolist() == [3, 3]


@pytest.mark.gpu
def test_runs_on_the_current_stream(gpu_path, randn):
    ours, other = (Tensors(gpu_path, F32, randn, shapes=[(1024, 1024)]) for _ in range(2))
    other.params[0].copy_(ours.params[0])
    grads = ours.make()
    ours.step(grads)
    late = [torch.zeros_like(g) for g in grads]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # had the kernel not waited, it would have seen zeros
        late[0].copy_(grads[0])
        other.step(late)
    stream.synchronize()
    assert equal(ours.state(), other.state())


def test_copies_and_what_was_written_beside_the_steps(path, dtype, randn):
    """A copy of p' for those that want one; a mark where p is another than its copy."""
    ours = Tensors(path, dtype, randn, shapes=[(3, 5), (64, 40), (2000,), (8, 16)])
    copies = [p.clone() for p in ours.params]
    copies[3] = None
    moved = torch.zeros(4, dtype=torch.int32, device=path.device)
    extra = {"copies": copies, "moved": moved}
    ours.step(ours.make(), **extra)
    assert equal(copies[:3], ours.params[:3]) and not moved.any()
    ours.params[1].data[63, 39] += 1
    ours.params[3].data[0, 0] += 1  # nobody asked for this one
    before = ours.snapshot()
    ours.step(ours.make(), found_inf=ours.scalar(1.0), **extra)
    assert equal(before, ours.state()) and not moved.any()
    ours.step(ours.make(), **extra)
    assert equal(copies[:3], ours.params[:3]) and moved.tolist() == [0, 1, 0, 0]
    ours.step(ours.make(), **extra)
    assert moved.tolist() == [0, 1, 0, 0]  # until the caller resets it


@pytest.mark.parametrize("wrong", ["dtype", "shape", "moved", "strides"])
def test_copies_that_do_not_fit(wrong, randn):
    p, zero = torch.ones(4, 6), torch.zeros(4, 6)
    copy = {"dtype": p.double(), "shape": p[:2], "strides": torch.ones(6, 4).T}.get(wrong, p)
    moved = torch.zeros(2 if wrong == "moved" else 1, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="moved" if wrong == "moved" else "copies"):
        adamw_step_(
            [p], [p.clone()], [zero], [zero.clone()], torch.zeros(1), lr=1.0, copies=[copy],
            moved=moved,
        )  # fmt: skip
    assert (p == 1).all()
