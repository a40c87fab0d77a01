"""What `deltadiff verify --full` draws: calls of every path, also of GPUs that are not here."""

import pytest
import torch

from deltadiff.ops.dispatch import choose_path
from deltadiff.ops.reference_blocks import ACTIVATIONS
from deltadiff.verify.grid.draws import INTERPRETED, ON_CPU, ON_GPU, Dice, Draw
from deltadiff.verify.grid.gated_mlp import draw_block
from deltadiff.verify.grid.lora_linear import draw_call
from deltadiff.verify.grid.paths import PATHS, dtypes_of
from deltadiff.verify.grid.quantised import FourBitFormat

H100 = torch.device("cuda:0")


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    choose_path.cache_clear()
    yield
    choose_path.cache_clear()


@pytest.mark.parametrize("kernel", [path for path in PATHS["lora_linear"] if path != "cpp"])
def test_calls_of_an_h100(kernel, h100):
    for dtypes in dtypes_of("lora_linear", kernel):
        calls = [draw_call(Draw(f"7 {dtypes}", i, ON_GPU), kernel, dtypes, H100) for i in range(40)]
        kinds = {(str(c.layouts), c.r, c.gate, c.dropout, c.wanted, c.asked) for c in calls}
        assert len(kinds) <= ON_GPU.kinds  # each compiles its kernels
        assert len({(c.tokens, c.k, c.n) for c in calls}) > 20
        if kernel.startswith("hopper"):
            assert all(c.tokens >= 256 and not c.dropout for c in calls)


@pytest.mark.parametrize("kernel", [path for path in PATHS["gated_mlp"] if path != "cpp"])
def test_blocks_of_an_h100(kernel, h100):
    for dtypes in dtypes_of("gated_mlp", kernel):
        calls = [
            draw_block(Draw(f"7 {dtypes}", i, ON_GPU), kernel, dtypes, H100) for i in range(20)
        ]
        kinds = {(str(c.layer.layouts), c.layer.r, c.activation, c.joint) for c in calls}
        assert len(kinds) <= ON_GPU.kinds
        assert not any(c.layer.dropout for c in calls)


def test_blocks_vary():
    device, pair = torch.device("cpu"), (torch.float32,) * 2
    calls = [draw_block(Draw("1", i, ON_CPU), "cpp", pair, device) for i in range(100)]
    assert {c.activation for c in calls} == set(ACTIVATIONS)
    for name in ("joint", "normed", "checkpointed", "stored"):
        assert {bool(getattr(c, name)) for c in calls} == {True, False}, name
    stored = [c.stored for c in calls if c.stored]
    four_bit = [s for s in stored if isinstance(s, FourBitFormat)]
    assert {s.nested for s in four_bit} == {True, False} and len(four_bit) < len(stored)


def test_calls_vary():
    device, pair = torch.device("cpu"), (torch.float32,) * 2
    calls = [draw_call(Draw("1", i, ON_CPU), "cpp", pair, device) for i in range(300)]
    assert {0, 1} < {c.tokens for c in calls} and max(c.tokens for c in calls) > 3000
    assert min(c.k for c in calls) == 1 and max(c.k for c in calls) > 8000
    assert max(c.tokens * c.k * c.n for c in calls) <= 2 ** (ON_CPU.most_products + 1)
    assert {len(c.leading) for c in calls} == {0, 1, 2}
    assert len({c.r for c in calls}) > 15 and max(c.r for c in calls) == 256
    layouts = [layout for c in calls for layout in c.layouts.values()]
    assert {1, 2, 3} < {layout.offset for layout in layouts}
    assert all(any(getattr(t, name) for t in layouts) for name in ("gap", "transposed", "expanded"))
    assert {c.gate if c.gate is None else len(c.gate) for c in calls} == {None, 0, 1}


def test_a_case_is_a_function_of_its_number():
    device, pair = torch.device("cpu"), (torch.float32,) * 2
    one, again, other = (
        draw_call(Draw("1", i, INTERPRETED), "cpp", pair, device) for i in (4, 4, 5)
    )
    assert one == again != other


def test_logarithms_are_uniform():
    dice = Dice("logarithms")
    found = [dice.between(1, 2**14 - 1) for _ in range(4000)]
    assert min(found) == 1 and max(found) > 2**13
    share = sum(size < 2**7 for size in found) / len(found)
    assert abs(share - 0.5) < 5 * 0.5 / 4000**0.5
