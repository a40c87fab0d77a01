"""Every kernel compiles for every kind of GPU, without spilling and within its shared memory.

This needs no GPU: the launchers run on CPU tensors over a stand-in driver. The test compiles what
they would launch, with the configurations that they would use.
"""

import concurrent.futures
import json
import re
import sys
from pathlib import Path

import pytest
from cubins import compile_instead, cuobjdump, records_of

# For each compute capability: the bytes of shared memory that CUDA gives one block (its programming
# guide, "Technical Specifications per Compute Capability"), and how many bytes a thread may spill.
# To fit one more block on a multiprocessor, ptxas spills a few words that a kernel needs only after
# its loops; in which kernels it does so depends on its version. A kernel that runs out of registers
# spills hundreds of bytes, and moves them in every turn of a loop. Rows of tables have a limit of
# their own: what they spill, they were measured with.
LIMITS = json.loads(Path(__file__).with_name("compile_limits.json").read_text())
# The least shared memory, the one with a kernel of its own, and the newest; the long form has the
# others. One takes some twenty seconds.
SHORT = ("86", "90", "120")
CAPABILITIES = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.long)
    for name in LIMITS
    if name.isdigit()
]


# ------------------------------------------------------------- in the subprocess


def _resources(cubin: bytes) -> dict:
    """Registers and bytes of local memory (stack, where spills go) of a compiled kernel."""
    text = cuobjdump(cubin, "-res-usage")
    found = {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}
    local = re.search(r"\bLOCAL:(\d+)", text)
    return {"registers": found["REG"], "spilled": found["STACK"] + (int(local[1]) if local else 0)}


def compile_all(capability: int):
    """Print one JSON line for each kernel that the launchers ask for."""
    import torch
    import triton.language as tl

    from deltadiff.kernels import (
        adamw_step,
        decode_4bit,
        decode_fp8,
        delta_update,
        gated_product,
        rms_norm,
        step_counters,
    )
    from deltadiff.kernels.lora_linear import few_tokens, hopper_launch, portable
    from deltadiff.kernels.lora_linear_fp8 import launch as fp8_launch
    from deltadiff.kernels.runtime import tuned
    from deltadiff.ops.decode_4bit import FourBit

    case = ""

    def seen(name, kernel):
        facts = {"kernel": name, "case": case, "shared": kernel.metadata.shared}
        print(json.dumps(facts | _resources(kernel.asm["cubin"])), flush=True)

    compile_instead(capability, seen)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def lora(m, dtype, adapter_dtype, r, gate, tf32=False, kernels=portable, **dropout):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        x, weight, dy = (torch.empty(s, dtype=dtype) for s in ((m, 1024), (512, 1024), (m, 512)))
        a, b = (torch.empty(s, dtype=adapter_dtype) for s in ((r, 1024), (512, r)))
        bias = torch.empty(512, dtype=dtype)
        _, s = kernels.lora_linear_fwd(x, weight, a, b, 2.0, gate, bias, **dropout)
        needs = [True] * 3 + [False]
        kernels.lora_linear_bwd(dy, x, weight, a, b, s, 2.0, gate, needs, **dropout)

    gate = torch.empty(16)
    for dtype, adapter_dtype, tf32 in (
        (bf16, bf16, False),
        (bf16, fp32, False),
        (fp16, fp32, False),
        (fp32, fp32, False),
        (fp32, fp32, True),
    ):
        case = f"{dtype} adapters {adapter_dtype}{' tf32' * tf32}, 4096 tokens, r 16"
        lora(4096, dtype, adapter_dtype, 16, gate, tf32)
    for m, r in ((1, 8), (32, 8), (64, 64), (300, 16), (64, 128), (4096, 128)):
        for dtype in (bf16, fp32):
            case = f"{dtype} adapters float32, {m} tokens, r {r}"
            few = dtype == bf16 and m < 512 and r <= 64
            lora(m, dtype, fp32, r, None, kernels=few_tokens if few else portable)

    seed = torch.empty((), dtype=torch.int64)
    for dtype, adapter_dtype, m, r, tf32 in (
        (bf16, fp32, 16384, 16, False),
        (fp16, fp16, 4096, 64, False),
        (bf16, bf16, 300, 8, False),
        (bf16, fp32, 8, 8, False),
        (fp32, fp32, 4096, 16, False),
        (fp32, fp32, 4096, 16, True),
    ):
        case = f"dropout, {dtype} adapters {adapter_dtype}{' tf32' * tf32}, {m} tokens, r {r}"
        lora(m, dtype, adapter_dtype, r, None, tf32, dropout=0.1, seed=seed)

    index, portable.index_type = portable.index_type, lambda *_: tl.int64
    case = "strides beyond 32 bits"
    lora(4096, bf16, bf16, 16, None)
    portable.index_type = index

    if capability == 90:
        for m, dtype, adapter_dtype, r, entries in (
            (512, bf16, bf16, 1, 0),  # narrow tiles
            (512, fp16, fp32, 32, 32),
            (16384, bf16, fp32, 16, 16),  # wide ones
            (16384, fp16, fp16, 32, 1),
            (16384, bf16, bf16, 32, 32),
            (16384, fp16, fp16, 64, 64),
        ):
            case = f"hopper, {dtype} adapters {adapter_dtype}, {m} tokens, r {r}, gate {entries}"
            gate = torch.empty(entries) if entries else None
            lora(m, dtype, adapter_dtype, r, gate, kernels=hopper_launch)

        for dtype, r, block, columns in (
            (bf16, 16, (128, 128), 128),
            (fp16, 128, (512, 1024), 1024),
            (bf16, 16, (1, 1024), 1024),
        ):
            case = f"FP8 products, {dtype}, r {r}, blocks of {block}"
            x, dy, bias = (torch.empty(s, dtype=dtype) for s in ((8192, 1024), (8192, 512), 512))
            scale = torch.empty(512 // block[0], 1024 // block[1])
            weight = torch.empty(512, 1024).to(torch.float8_e4m3fn), scale, block
            pair = torch.empty(r, 1024), torch.empty(512, r)
            _, s = fp8_launch.lora_linear_fwd(x, weight, columns, *pair, 2.0, None, bias)
            needs = [True] * 3 + [False]
            fp8_launch.lora_linear_bwd(dy, x, weight, columns, *pair, s, 2.0, None, needs)

    for dtype, k, nested in (
        (bf16, 1024, True),
        (fp16, 1024, False),
        (fp32, 1024, True),
        (bf16, 1023, True),
    ):
        case = f"{dtype}, K {k}, {'nested' if nested else 'plain'} absmax"
        absmax = torch.empty(1024, dtype=torch.uint8 if nested else fp32)
        scales = (torch.empty(4), torch.empty(256), torch.empty(())) if nested else (None,) * 3
        tensors = torch.empty(1024 * 32, dtype=torch.uint8), absmax, torch.empty(16), *scales
        weight = FourBit(*tensors, (64, k), 64, 256)
        decode_4bit.decode_4bit(weight, torch.empty(weight.shape, dtype=dtype))

    for dtype, data, k, block in (
        (bf16, torch.float8_e4m3fn, 1024, (128, 128)),
        (fp16, torch.float8_e5m2, 1024, (1, 1024)),
        (fp32, torch.float8_e4m3fn, 1024, (64, 1024)),
        (bf16, torch.float8_e4m3fn, 1023, (7, 9)),
    ):
        case = f"{dtype} of {data}, K {k}, blocks of {block}"
        scale = torch.empty(-(-64 // block[0]), -(-k // block[1]))
        out = torch.empty(64, k, dtype=dtype)
        decode_fp8.decode_fp8(torch.empty(64, k).to(data), scale, block, out)

    step = torch.empty((), dtype=torch.int64)
    for dtype, roundings in (
        (fp32, ["none"]),
        (bf16, ["nearest", "stochastic", "remainder"]),
        (fp16, ["nearest", "stochastic", "remainder"]),
    ):
        for rounding in roundings:
            for k, r in ((1024, 8), (1023, 8), (1024, 64)):
                case = f"{dtype} {rounding}, K {k}, r {r}"
                low = torch.empty(64, k, dtype=torch.int16)
                delta_update.delta_update_(
                    [torch.empty(64, k, dtype=dtype)],
                    [torch.empty(r, k)], [torch.empty(64, r)],
                    [torch.empty(r, k)], [torch.empty(64, r)],
                    [1.0], rounding, [low] if rounding == "remainder" else [], 0, step, step,
                )  # fmt: skip
    one = torch.ones(())
    for dtype, moment_dtype in ((fp32, fp32), (bf16, bf16), (bf16, fp32), (fp16, fp32)):
        case = f"{dtype} moments {moment_dtype}"
        p, m = torch.empty(4096, dtype=dtype), torch.empty(4096, dtype=moment_dtype)
        adamw_step.adamw_step_(
            [p], [p], [m], [m], torch.zeros(1), 1e-3, 0.9, 0.999, 1e-8, 0.01,
            [torch.empty(4096)], [p], one, one, one, [p], torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip
    for dtype in (bf16, fp16, fp32):
        m, k = 512, 4096
        x, w, e, g, dh = (torch.empty(s, dtype=dtype) for s in ((m, k), k, *[(m, 1024)] * 3))
        for rounds_twice in (True, False):
            case = f"{dtype} RMSNorm, rounds twice {rounds_twice}"
            _, rstd = rms_norm.rms_norm(x, w, 1e-6, 0.0, rounds_twice)
            rms_norm.rms_norm_again(x, w, rstd, 0.0, rounds_twice)
            rms_norm.rms_norm_bwd(x, x, w, rstd, 0.0)
        for activation in gated_product.ACTIVATIONS:
            case = f"{dtype} {activation}"
            gated_product.gated_product(e, g, activation)
            gated_product.gated_product_bwd(e, g, dh, activation, e, g)
            # Behind the sm_90 kernel, which takes 16 bits.
            for r in (16, gated_product.LARGEST_RANK) if capability == 90 and dtype != fp32 else ():
                v = torch.empty(m, r, dtype=dtype)
                case = f"{dtype} {activation}, r {r}"
                gated_product.gated_product_bwd_and_da(e, g, dh, v, r, activation, e, g)

    flags, count = torch.empty(2, 2, dtype=torch.int32), torch.empty(2, dtype=torch.int64)
    for found_inf in (None, one):
        case = f"found_inf {found_inf}"
        step_counters.advance_counters_(step, one, count, count, flags, one, one, count, found_inf)

    for path in sorted(Path(tuned.__file__).parents[1].glob("tuned/*.json")):
        table = tuned.load(path)
        for launch, config in table.items():
            case = f"row {launch.key} of {path.name}"
            tuned.use(torch.device("cpu"), {launch: config})
            compiled = tuned.asked(lambda launch=launch: case_of(launch)())
            assert compiled[launch].items() >= config.items(), case


def case_of(launch):
    """A call that is launched with a row of a table of tuned configurations."""
    import torch

    from deltadiff.kernels.launch_configs import LAUNCH_CONFIGS
    from deltadiff.tuning.cases import Linear, Update

    key = dict(zip(LAUNCH_CONFIGS[launch.op].keys, launch.key, strict=True))
    dtype = torch.float32 if key.get("itemsize") == 4 else torch.bfloat16
    if launch.op == "delta_update":  # its product has two columns for each rank
        case = Update(key["rank"] // 2, dtype, key["rounding"], size=64)
    else:
        k, n = key["K"], key.get("N", 256)
        case = Linear(key["M"], k, n, key["rank"], dtype, key.get("backward", False))
    return case.call(case.inputs(torch.device("cpu")))


# ----------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def compiled(request):
    wanted = [c for c in LIMITS if c in SHORT or (c.isdigit() and request.config.option.check)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return {capability: pool.submit(records_of, __file__, capability) for capability in wanted}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(compiled, capability):
    kernels, limit = compiled[capability].result(), LIMITS[capability]
    hopper = set()
    if capability == "90":
        hopper = {
            "lora_linear_hopper_kernel", "pack_kernel", "gated_product_bwd_and_da_kernel",
            "fp8_product_kernel", "quantise_kernel", "finish_kernel", "transpose_kernel",
        }  # fmt: skip
    assert {k["kernel"] for k in kernels} == hopper | {
        "lora_linear_down_kernel", "lora_linear_fwd_kernel", "lora_linear_wgrad_kernel",
        "lora_linear_few_kernel", "few_sum_kernel", "sum_splits_kernel",
        "delta_update_kernel", "adamw_step_kernel", "advance_counters_kernel",
        "decode_4bit_kernel", "decode_fp8_kernel", "rms_norm_kernel", "rms_norm_bwd_kernel",
        "gated_product_kernel", "gated_product_bwd_kernel",
    }  # fmt: skip
    most = [(LIMITS["tuned"] if k["case"].startswith("row") else limit)["spilled"] for k in kernels]
    assert [k for k, m in zip(kernels, most, strict=True) if k["spilled"] > m] == []
    assert [k for k in kernels if k["shared"] > limit["shared"]] == []


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
