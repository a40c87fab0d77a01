"""Every wrong argument of an operation is refused in words, and nothing is changed."""

import random

import pytest
import torch
from wrong_arguments import (
    adamw_step_call,
    decode_4bit_call,
    decode_fp8_call,
    delta_update_call,
    draw,
    lora_linear_call,
)

import deltadiff
from deltadiff.errors import ArgumentError
from deltadiff.ops.decode_4bit import FourBit, decode_4bit
from deltadiff.ops.decode_fp8 import Float8, decode_fp8

CASES = 60  # for each seed


def of_4_bits(dtype, backend, **parts):
    return decode_4bit(FourBit(**parts), dtype, backend=backend)


def of_fp8(dtype, backend, **parts):
    return decode_fp8(Float8(**parts), dtype, backend=backend)


MAKERS = {
    "decode_4bit": lambda device, _: decode_4bit_call(of_4_bits, device),
    "decode_fp8": lambda device, _: decode_fp8_call(of_fp8, device),
    "lora_linear": lambda device, _: lora_linear_call(deltadiff.lora_linear, device),
    "delta_update_": lambda *how: delta_update_call(deltadiff.delta_update_, *how),
    "adamw_step_": lambda *how: adamw_step_call(deltadiff.adamw_step_, *how),
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*prototype:UserWarning",
    "ignore:.*beta state:UserWarning",
    "ignore:.*are deprecated:UserWarning",
)


@pytest.mark.check(short=2, long=100)
@pytest.mark.parametrize("op", MAKERS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_wrong_arguments_are_refused(op, device, seed, tally):
    random_, failures = random.Random(seed), []
    for _ in range(CASES):
        call, name, value = draw(lambda r: MAKERS[op](device, r), random_)
        if random_.random() < 0.5:
            call.op(**call.arguments)  # so that its checks and launches are cached
        tensors = call.tensors()
        before = [t.clone() for t in tensors]
        try:
            call.op(**call.arguments | {name: value})
            failures.append(f"{name} = {value!r:.80} is taken")
        except ArgumentError as error:
            said = str(error)
            if not said.isprintable() or len(said) > 400:
                failures.append(f"{name} = {value!r:.80}: {said}")
        except Exception as error:
            failures.append(f"{name} = {value!r:.80} raises {error!r:.120}")
        if not all(map(torch.equal, tensors, before)):
            failures.append(f"{name} = {value!r:.80} changed a tensor")
    path = "cpu" if device == "cpu" else "cuda"
    tally("mutants", f"arguments of {op}", CASES, len(failures), path)
    assert not failures, "\n".join(failures)
