"""The same call gives the same bits on another stream, in a CUDA graph, and beside other work."""

import pytest
import torch
from hopper_calls import on_hopper
from op_paths import BF16, F16, F32, OpPath
from repeated_calls import CALLS, linear, same

REPEATS = 10
TRITON, HOPPER = (OpPath(torch.device("cuda", 0), name) for name in ("triton", "hopper"))


def on_another_stream(run, expected):
    """How many of the repeats differ on a stream of their own."""
    stream, wrong = torch.cuda.Stream(), 0
    for _ in range(REPEATS):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = run()
        torch.cuda.current_stream().wait_stream(stream)
        wrong += not same(found, expected)
    return wrong


def in_a_graph(run, expected):
    """How many of the replays of a captured call differ."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is compiled or allocated once
    torch.cuda.current_stream().wait_stream(stream)
    graph, wrong = torch.cuda.CUDAGraph(), 0
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(REPEATS):
        for t in found:
            t.zero_()
        graph.replay()
        wrong += not same(found, expected)
    return wrong


def beside_a_busy_stream(run, expected):
    """How many of the repeats differ while products run on another stream."""
    busy, wrong = torch.cuda.Stream(), 0
    a = torch.randn(2048, 2048, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    for _ in range(REPEATS):
        with torch.cuda.stream(busy):
            for _ in range(20):
                b = a @ a
        wrong += not same(run(), expected)
    torch.cuda.synchronize()
    del b
    return wrong


WAYS = {
    "on another stream": on_another_stream,
    "in a CUDA graph": in_a_graph,
    "beside a busy stream": beside_a_busy_stream,
}


def check(run, op, way, path, dtype, tally):
    expected = [t.clone() for t in run()]
    torch.cuda.synchronize()
    failures = WAYS[way](run, expected)
    words = f"{op} {way}"
    tally("repeats", words, REPEATS, failures, path=f"{path}-cuda", dtype=str(dtype)[6:])
    assert not failures


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.check(short=1, long=25)
def test_triton(op, dtype, way, seed, tally):
    if way == "in a CUDA graph" and op.startswith("lora_linear"):
        run = CALLS[op](TRITON, dtype, seed, tokens=600)
    else:
        run = CALLS[op](TRITON, dtype, seed, size=256)
    check(run, op, way, "triton", dtype, tally)


@on_hopper
@pytest.mark.parametrize("way", [*WAYS, ""])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.check(short=1, long=25)
def test_sm_90(dtype, way, seed, tally):
    run = linear(HOPPER, dtype, seed, tokens=700, size=512)
    if way:
        check(run, "lora_linear", way, "hopper", dtype, tally)
        return
    expected = run()
    failures = sum(not same(run(), expected) for _ in range(REPEATS))
    tally("repeats", "lora_linear", REPEATS, failures, "hopper-cuda", str(dtype)[6:])
    assert not failures


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.check(short=1, long=25)
def test_few_tokens(dtype, seed, tally):
    """Sizes of which the kernel for few tokens takes calls of up to 511 tokens."""
    run = linear(TRITON, dtype, seed, tokens=100, size=1024)
    expected = run()
    failures = sum(not same(run(), expected) for _ in range(REPEATS))
    tally("repeats", "lora_linear", REPEATS, failures, "triton few_tokens-cuda", str(dtype)[6:])
    assert not failures
