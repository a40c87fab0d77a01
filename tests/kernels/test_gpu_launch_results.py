"""Launches from C++ give the results of the launchers in Python, on a GPU, bit for bit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hopper_calls import on_hopper

NO_DROPOUT = 0.0, None


def _inputs(m, adapter, r, gates, bias, device="cuda", dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(m + r)

    def normal(*shape, std=1.0, dtype=dtype):
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    x, w, dy = normal(m, 1024), normal(768, 1024, std=1 / 32), normal(m, 768)
    a, b = normal(r, 1024, std=1 / 32, dtype=adapter), normal(768, r, dtype=adapter)
    gate = None if gates is None else normal(*gates, dtype=adapter)
    return x, w, a, b, gate, normal(768) if bias else None, dy


def _outputs(suffix, x, w, a, b, gate, bias, dy):
    fwd, bwd = (getattr(torch.ops.deltadiff, f"lora_linear_{p}{suffix}") for p in ("fwd", "bwd"))
    y, kept = fwd(x, w, a, b, 1.7, gate, bias, *NO_DROPOUT, "hopper")
    needs = [True, True, True, gate is not None]
    return [y, *bwd(dy, x, w, a, b, kept, 1.7, gate, needs, *NO_DROPOUT, "hopper")]


def _assert_equal(ours, theirs):
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one is None) == (other is None), i
        assert one is None or torch.equal(one, other), i


@on_hopper
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [512, 1000, 8192])
@pytest.mark.parametrize(
    ("r", "gates", "bias"), [(16, None, False), (5, (), True), (64, (64,), False)]
)
def test_results_are_those_of_the_python_launcher(m, adapter, r, gates, bias):
    inputs = _inputs(m, adapter, r, gates, bias)
    expected = _outputs("_python", *inputs)
    _assert_equal(_outputs("", *inputs), expected)
    _assert_equal(_outputs("", *inputs), expected)


@on_hopper
def test_results_on_another_stream_in_a_thread_and_in_a_graph():
    inputs = _inputs(2048, torch.float32, 16, (16,), True)
    expected = _outputs("_python", *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _assert_equal(_outputs("", *inputs), expected)
    torch.cuda.current_stream().wait_stream(stream)
    with ThreadPoolExecutor(1) as pool:  # a thread that has no context yet
        _assert_equal(pool.submit(_outputs, "", *inputs).result(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _outputs("", *inputs)
    for _ in range(3):
        for output in outputs:
            output.zero_()
        graph.replay()
        _assert_equal(_outputs("", *inputs), expected)
        _assert_equal(outputs, expected)


@on_hopper
def test_gate_and_bias_with_strides():
    x, w, a, b, gate, bias, dy = _inputs(1024, torch.float32, 16, (16,), True)
    sparse = [torch.stack([t, -t], dim=1)[:, 0] for t in (gate, bias)]
    assert not any(t.is_contiguous() for t in sparse)
    expected = _outputs("", x, w, a, b, gate, bias, dy)
    for suffix in ("", "_python"):
        _assert_equal(_outputs(suffix, x, w, a, b, *sparse, dy), expected)


@on_hopper
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_results_on_a_device_that_is_not_current():
    inputs = _inputs(1024, torch.float32, 16, None, True, device="cuda:1")
    with torch.cuda.device(0):
        ours = _outputs("", *inputs)
        assert torch.cuda.current_device() == 0
    _assert_equal(ours, _outputs("_python", *inputs))
