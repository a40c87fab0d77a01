"""Blocks of the sm_90 kernel that wait for others: on several streams, in graphs, side by side."""

import time

import pytest
import torch
from hopper_calls import on_hopper, run
from lora_linear_calls import inputs

BF16 = torch.bfloat16


def finish(*streams, seconds=60):
    """Wait for streams. Blocks that wait for each other end the whole run: the GPU is lost."""
    deadline = time.monotonic() + seconds
    while not all(stream.query() for stream in streams):
        if time.monotonic() > deadline:
            pytest.exit("blocks of the sm_90 kernel wait for each other for ever", returncode=3)
        time.sleep(0.001)


SHAPES = [(4096, 2048, 1024, 16), (640, 520, 776, 8), (2048, 1024, 1024, 64)]


@on_hopper
def test_many_launches_on_two_streams(randn):
    problems = [inputs(randn, *shape, BF16, "cuda", gate=(shape[-1],)) for shape in SHAPES]
    expected = [run(given) for given in problems]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for _ in range(5):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    for j in (0, 1, 2) if i else (2, 0, 1):
                        found.append((j, run(problems[j])))
        finish(*streams)
        for j, results in found:
            assert all(torch.equal(value, expected[j][name]) for name, value in results.items())


def captured(given):
    """A CUDA graph of both passes, and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(given)
    finish(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(given)
    return graph, results


@on_hopper
@pytest.mark.parametrize("which", [(0, 1), (1, 1), (0, 2)], ids=str)
def test_graphs_that_run_at_the_same_time(which, randn):
    problems = [inputs(randn, *SHAPES[i], BF16, "cuda", gate=(SHAPES[i][-1],)) for i in which]
    graphs = [captured(given) for given in problems]
    streams = [torch.cuda.Stream() for _ in graphs]
    for turn in range(20):
        for given in problems:
            for t in (given[0], given[-1]):  # other inputs in each turn
                t.mul_(-1 if turn % 2 else 0.5)
        expected = [run(given) for given in problems]
        for _, results in graphs:
            for t in results.values():
                t.fill_(torch.nan)
        torch.cuda.synchronize()
        for _ in range(5):
            for (graph, _), stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        finish(*streams)
        for (_, results), right in zip(graphs, expected, strict=True):
            assert all(torch.equal(t, right[name]) for name, t in results.items()), turn


@on_hopper
def test_eager_calls_beside_a_graph(randn):
    given = inputs(randn, *SHAPES[0], BF16, "cuda")
    graph, results = captured(given)
    expected, stream = run(given), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(stream):
            graph.replay()
        eager = run(given)
        finish(stream, torch.cuda.current_stream())
        for name, right in expected.items():
            assert torch.equal(results[name], right) and torch.equal(eager[name], right), name
