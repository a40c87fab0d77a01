"""`lora_linear` over weights of 4 bits and in FP8, on every backend."""

import functools
import gc

import pytest
import torch
from four_bit import FORMATS as FOUR_BIT
from four_bit import four_bit
from fp8 import BLOCKS, float8
from lora_linear_calls import doubles, inputs, kept_by, outputs
from torch.library import opcheck
from torch.testing._internal.optests.generate_tests import ALL_TEST_UTILS
from torch.utils.checkpoint import checkpoint

from deltadiff import lora_linear
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops.quantised import check_quantised, decoded, first_rows, operation
from deltadiff.ops.reference import lora_linear_ref

pytest.importorskip("bitsandbytes")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

FORMATS = [*FOUR_BIT, *BLOCKS[:2]]  # 4 bits of bitsandbytes, blocks of FP8
ONE_OF_EACH = [FOUR_BIT[0], BLOCKS[0]]

CASES = [  # tokens, in, out, r, gate, bias, adapters in float32
    ((3, 64, 24, 5), None, True, False),
    ((37, 129, 65, 3), (3,), False, False),
    ((70, 64, 72, 8), (1,), True, True),
]


def quantised(given, device, form=FOUR_BIT[0]):
    """The arguments of `inputs` with W in few bits, and with the W that those stand for."""
    x, w, *rest = given
    in_4_bits = form in FOUR_BIT
    weight = four_bit(w.float(), *form, device=device) if in_4_bits else float8(w, form, device)
    return [x, weight, *rest], [x, decoded(weight, x.dtype, "reference"), *rest]


def interpreted(path):
    """Whether Triton interprets, which is slow."""
    return path.backend == "triton" and path.device.type == "cpu"


def small(randn, path, k=64, n=48, dtype=F32, form=FOUR_BIT[0], **more):
    """`quantised` for 8 tokens and rank 2."""
    return quantised(inputs(randn, 8, k, n, 2, dtype, path.device, **more), path.device, form)


@pytest.mark.parametrize("shape, gate, bias, mixed", CASES, ids=lambda v: str(v).replace(" ", ""))
def test_output_and_gradients(path, dtype, shape, gate, bias, mixed, randn, assert_close):
    given = inputs(randn, *shape, dtype, path.device, F32 if mixed else dtype, gate, bias)
    for form in ONE_OF_EACH if interpreted(path) else FORMATS:
        packed, dense = quantised(given, path.device, form)
        ours = outputs(lora_linear, *packed, backend=path.backend)
        eager = outputs(lora_linear_ref, *dense)
        truth = outputs(lora_linear_ref, *doubles(dense))
        for name, expected in truth.items():
            assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3,
                         dtype if name == "gate" else None)  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("n, k", [(200, 64), (37, 129), (5, 33)])
def test_first_rows(form, n, k, randn):
    w = randn(n, k)
    weight = four_bit(w, *form, device="cpu") if form in FOUR_BIT else float8(w, form)
    for count in (1, 16, 130):
        few = first_rows(weight, count)
        check_quantised("weight", few)
        assert torch.equal(
            decoded(few, F32, "reference"), decoded(weight, F32, "reference")[:count]
        )


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_bits_are_those_of_the_decoded_weight(path, dtype, form, randn):
    """With dropout, a leading shape and every gradient: nothing but W differs from the dense op."""
    if interpreted(path) and (dtype == F32 or form not in ONE_OF_EACH):
        pytest.skip("one case says the same")
    x, *rest, dy = inputs(randn, 24, 96, 40, 4, dtype, path.device, F32, (4,), True)
    given = [x.view(2, 12, 96), *rest, dy.view(2, 12, 40)]
    packed, dense = quantised(given, path.device, form)
    for dropout in (0.0, 0.25):
        how = dict(dropout=dropout, seed=3, backend=path.backend)
        ours, theirs = outputs(lora_linear, *packed, **how), outputs(lora_linear, *dense, **how)
        assert ours.keys() == theirs.keys() and ours["y"].shape == (2, 12, 40)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (name, dropout)


@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_nothing_of_the_size_of_W_is_kept(path, form, randn):
    if path.backend == "reference":
        pytest.skip("it keeps W, as its docstring says")
    (x, weight, a, b, *_), _ = small(randn, path, 128, 96, form=form)
    how = dict(scaling=0.7, backend=path.backend)
    _, kept = kept_by(lora_linear, x.requires_grad_(), weight, a.requires_grad_(), b, **how)
    assert kept and max(t.numel() * t.element_size() for t in kept) <= x.numel() * 4
    assert not any(t.data_ptr() == weight[0].data_ptr() for t in kept), "hooks would move it"


def test_layers_that_decode_between_the_passes_of_another(path, randn):
    """The backward pass decodes W again: by then, the memory of the first decoding is another's."""
    layers = [small(randn, path, 128, 128) for _ in range(3)]
    found = []
    for kind in (0, 1):
        x = layers[0][0][0].detach().requires_grad_()
        y = x
        for layer in layers:
            _, weight, a, b, *_ = layer[kind]
            y = lora_linear(y, weight, a, b, scaling=0.1, backend=path.backend)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("needed", ["x", "lora_A", "lora_B", "gate", "bias"])
def test_gradients_are_made_where_they_are_needed(path, needed, randn):
    packed, dense = small(randn, path, gate=(2,), bias=True)
    found = []
    for x, weight, a, b, gate, bias, dy in (packed, dense):
        leaves = dict(x=x, lora_A=a, lora_B=b, gate=gate, bias=bias)
        leaves = {n: t.detach().requires_grad_(n == needed) for n, t in leaves.items()}
        y = lora_linear(weight=weight, scaling=0.7, backend=path.backend, **leaves)
        found.append(torch.autograd.grad(y, leaves[needed], dy)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(path, reentrant, randn):
    (x, weight, a, b, _, _, dy), _ = small(randn, path)
    found = []
    for wrap in (False, True):
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]

        def layer(x, a, b):
            return lora_linear(x, weight, a, b, scaling=0.7, backend=path.backend)

        y = checkpoint(layer, *leaves, use_reentrant=reentrant) if wrap else layer(*leaves)
        y.backward(dy)
        found.append([y, *(t.grad for t in leaves)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_autocast_computes_in_its_dtype(form, randn):
    packed, _ = quantised(inputs(randn, 8, 64, 48, 2, F32, "cpu", bias=True), "cpu", form)
    with torch.autocast("cpu", BF16):
        y = lora_linear(*packed[:4], scaling=0.7, bias=packed[5])
    x, weight, a, b, _, bias, _ = packed
    expected = lora_linear(x.to(BF16), weight, a, b, scaling=0.7, bias=bias.to(BF16))
    assert y.dtype == BF16 and torch.equal(y, expected)


@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_second_derivatives_and_transforms(form, randn):
    packed, dense = quantised(inputs(randn, 6, 64, 48, 2, F32, "cpu"), "cpu", form)
    found = []
    for x, weight, a, b, *_ in (packed, dense):

        def loss(x, a, b, weight=weight):
            return lora_linear(x, weight, a, b, scaling=0.7).sin().sum()

        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        by_func = torch.func.grad(loss)(x, a, b)
        rows = torch.func.vmap(lambda row: lora_linear(row, weight, a, b, scaling=0.7))(x[:, None])  # noqa: B023
        found.append([*second, by_func, rows])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", [*ONE_OF_EACH, ("nf4", 64, False)], ids=str)
def test_a_compiled_call_is_one_graph(device, form, randn):
    torch._dynamo.reset()
    dtype = F32 if device == "cpu" else BF16
    given = inputs(randn, 12, 64, 48, 2, dtype, device, F32, (2,), True)
    packed, _ = quantised(given, device, form)
    results, kept = [], []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):

        def call(x, weight, a, b, **rest):
            return lora_linear(x * 2, weight, a, b, **rest) * 2

        kept.append(kept_by(outputs, wrap(call), *packed)[1])
        results.append(outputs(wrap(call), *packed))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    most = given[1].numel() * 2
    assert all(t.numel() * t.element_size() < most for tensors in kept for t in tensors)


@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
def test_the_operations_are_what_their_schemas_say(path, form, gated, randn):
    if path.backend == "reference" or interpreted(path):
        pytest.skip("the operations are those of the other backends")
    packed, _ = small(randn, path, form=form, gate=(2,) if gated else None)
    x, weight, a, b, gate, bias, dy = packed
    op, fwd, bwd = (operation(weight, which).default for which in ("", "_fwd", "_bwd"))
    parts = weight.parts
    args = a, b, 0.7, gate, bias, 0.0, None, path.backend
    # torch's check that nothing is written compares by a product, which it has not for FP8.
    tests = set(ALL_TEST_UTILS) - ({"test_schema"} if form in BLOCKS else set())
    check = functools.partial(opcheck, test_utils=tuple(tests))
    check(fwd, (x, *parts, *args))
    _, s = fwd(x, *parts, *args)
    for needs in ([True, True, True, gated], [False, False, True, False]):
        kept = x if needs[1] else None, *parts, a, b, s, 0.7, gate, needs, *args[5:]
        check(bwd, (dy, *kept))
    leaves = [t if t is None else t.requires_grad_() for t in (a, b)]
    leaves += [0.7, gate if gate is None else gate.requires_grad_()]
    check(op, (x.requires_grad_(), *parts, *leaves, *args[4:]))


def test_a_compiled_call_takes_any_number_of_tokens(randn):
    torch._dynamo.reset()
    (_, weight, a, b, *_), _ = quantised(inputs(randn, 8, 64, 48, 2, F32, "cpu"), "cpu")
    graphs = []

    def layer(x):
        return lora_linear(x, weight, a, b, scaling=0.7)

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for shape in ((5, 9, 64), (6, 9, 64), (2, 70, 64)):
        x = randn(*shape)
        assert torch.equal(compiled(x), layer(x)) and len(graphs) == 1


def test_parts_of_FP8_that_do_not_fit_are_named(randn):
    (x, weight, a, b, *_), _ = quantised(inputs(randn, 8, 64, 48, 2, F32, "cpu"), "cpu", BLOCKS[0])
    for change, told in (
        ({"data": None}, "weight.data: got NoneType"),
        ({"data": weight.data[0]}, r"weight.data: got shape \(64,\)"),
        ({"scale": weight.scale[:, 0]}, r"weight.scale: got shape \(1,\)"),
    ):
        with pytest.raises(ArgumentError, match=told):
            lora_linear(x, weight._replace(**change), a, b, scaling=1.0)


def test_what_does_not_fit_is_named(randn):
    (x, weight, a, b, *_), _ = quantised(
        inputs(randn, 8, 64, 48, 2, F32, "cpu"), torch.device("cpu")
    )
    with pytest.raises(ArgumentError, match=r"weight.code: got shape \(8,\)"):
        lora_linear(x, weight._replace(code=weight.code[:8]), a, b, scaling=1.0)
    with pytest.raises(ArgumentError, match=r"x: got shape \(8, 32\); accepted: shape \(8, 64\)"):
        lora_linear(x[:, :32], weight, a, b, scaling=1.0)
    with pytest.raises(ArgumentError, match=r"lora_B: got shape \(47, 2\)"):
        lora_linear(x, weight, a, b[1:], scaling=1.0)
    with pytest.raises(ArgumentTypeError, match="lora_A: got dtype torch.float16"):
        lora_linear(x, weight, a.half(), b.half(), scaling=1.0)
    with pytest.raises(ArgumentTypeError, match="bias: got dtype torch.float16"):
        lora_linear(x, weight, a, b, scaling=1.0, bias=randn(48, dtype=F16))


# ------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_one_workspace_serves_all_layers(randn):
    """Peak memory does not grow by W for each layer, and no memory stays after the passes."""
    m, n, r = 64, 2048, 8
    (x, weight, a, b, *_), _ = quantised(inputs(randn, m, n, n, r, BF16, "cuda", F32), "cuda")
    x.requires_grad_()
    peaks = []
    for layers in (2, 2, 6):  # the first round makes what stays
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = x
        for _ in range(layers):
            y = lora_linear(y, weight, a, b, scaling=0.1)
        y.square().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] - peaks[1] < n * n * 2 / 2


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 1024])
def test_a_captured_graph_decodes_for_itself(tokens, randn):
    """A replay is right after eager calls on this stream, and beside those on another one."""
    given = [
        quantised(inputs(randn, tokens, 512, 512, 8, BF16, "cuda", F32), "cuda")[0]
        for _ in range(2)
    ]
    (x, weight, a, b, _, _, dy), other = given
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]

    def step():
        y = lora_linear(leaves[0], weight, *leaves[1:], scaling=0.7)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        side
    ):  # a graph of the current stream's would bring that into the capture
        expected = [t.detach().clone() for t in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        with torch.cuda.stream(side):
            for _ in range(3):
                lora_linear(*other[:4], scaling=0.7)
        graph.replay()
        lora_linear(*other[:4], scaling=0.7)
        assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
def test_streams_do_not_share_a_workspace(randn):
    given = [
        quantised(inputs(randn, 512, 2048, 2048, 8, BF16, "cuda", F32), "cuda")[0] for _ in range(2)
    ]
    expected = [lora_linear(*each[:4], scaling=0.7) for each in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(30):
        found = []
        for stream, each in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                found.append(lora_linear(*each[:4], scaling=0.7))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))
