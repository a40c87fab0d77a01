"""Launches from C++ are the same as those of Triton's own launcher, bit for bit.

This needs no GPU: a stand-in for libcuda records what it is given, CPU tensors lend their
addresses, and the compiled kernel says how large its parameters are.
"""

import ctypes
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cubins import cuobjdump, records_of

STREAM = 0x5EA0
NO_DROPOUT = 0.0, None

CUDA_SOURCE = """
#include <stdint.h>
int result = 0, capturing = 0;
int (*on_launch)(const unsigned *config, void *function, void **parameters);
int cuLaunchKernelEx(const unsigned *config, void *function, void **parameters, void **extra) {
  on_launch(config, function, parameters);
  return result;
}
int cuTensorMapEncodeTiled(int64_t *map, int type, uint32_t rank, void *address,
    const uint64_t *shape, const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
    int interleave, int swizzle, int l2, int fill) {
  int64_t facts[16] = {type, rank, (int64_t)address, shape[0], shape[1], strides[0], box[0], box[1],
                       steps[0], steps[1], interleave, swizzle, l2, fill, 0, 0};
  for (int i = 0; i < 16; ++i) map[i] = facts[i];
  return 0;
}
int cuStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "out of luck"; return 0; }
int cuCtxGetCurrent(void **context) { *context = &result; return 0; }
int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) {
  *data = pointer;
  return 0;
}
"""
TORCH_SOURCE = f"""
int aoti_torch_get_current_cuda_stream(int device, void **stream) {{
  *stream = (void *){STREAM};
  return 0;
}}
"""


# ------------------------------------------------------------- in the subprocess


def _build(folder: Path, soname: str, source: str) -> ctypes.CDLL:
    (folder / "source.c").write_text(source)
    options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", "-o", folder / soname]
    subprocess.run(["cc", *options, folder / "source.c"], check=True)
    return ctypes.CDLL(str(folder / soname))


def _stand_in_cuda(folder: Path) -> ctypes.CDLL:
    """A libcuda with all that Triton's launcher links to; the source above has what matters."""
    from triton.backends import nvidia

    text = "".join(
        (Path(nvidia.__file__).parent / f).read_text() for f in ("driver.c", "driver.py")
    )
    names = set(re.findall(r"\b(cu[A-Z]\w+)\(", text)) | {"cuCtxSetCurrent", "cuDeviceGet"}
    names |= {"cuDevicePrimaryCtxRetain"}
    rest = sorted(name for name in names if f" {name}(" not in CUDA_SOURCE)
    source = CUDA_SOURCE + "\n".join(f"int {name}() {{ return 0; }}" for name in rest)
    library = _build(folder, "libcuda.so.1", source)
    (folder / "libcuda.so").symlink_to(folder / "libcuda.so.1")
    return library


def _parameter_sizes(cubin: bytes) -> list[int]:
    text = cuobjdump(cubin, "-elf")
    found = re.findall(r"KPARAM_INFO\n.*\n.*Ordinal : (0x\w+).*Size *: (0x\w+)", text)
    sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    return [sizes[i] for i in range(len(sizes))]


class _Driver:
    """Triton's launcher over the stand-in; nothing is loaded anywhere."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.target = GPUTarget("cuda", 90, 32)
        self.launcher_cls, self.utils = CudaLauncher, CudaUtils()
        self.utils.load_binary = self.load
        self.utils.get_device_properties = lambda device: {"max_shared_mem": 227 << 10}
        self.sizes: dict[int, list[int]] = {}  # bytes of each parameter, by function
        self.loaded: list[str] = []  # names of kernels

    def load(self, name, cubin, shared, device):
        self.loaded.append(name)
        function = len(self.sizes) + 1
        self.sizes[function] = _parameter_sizes(cubin)
        return function, function, 168, 0, 1024

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return STREAM


class _Notes:
    """A record of what was launched, with names for the addresses."""

    def __init__(self, cuda: ctypes.CDLL, driver: _Driver):
        self.driver, self.launches = driver, []
        signature = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
        )  # fmt: skip
        self.callback = signature(self.note)
        ctypes.c_void_p.in_dll(cuda, "on_launch").value = ctypes.cast(
            self.callback, ctypes.c_void_p
        ).value

    def note(self, config, function, parameters):
        stream = ctypes.cast(config, ctypes.POINTER(ctypes.c_uint64))[4]
        attributes = config[12]
        values = [
            ctypes.string_at(parameters[i], size)
            for i, size in enumerate(self.driver.sizes[function])
        ]
        self.launches.append(([*config[:7], stream, attributes, function], values))
        return 0

    def taken(self, **tensors) -> list:
        """The launches since the last call, with names instead of addresses.

        An address that is no tensor's is named by the order in which it appeared.
        """
        names, count = {t.data_ptr(): name for name, t in tensors.items()}, itertools.count()

        def named(value: bytes):
            if len(value) % 8:
                return value.hex()
            words = [int.from_bytes(value[i : i + 8], "little") for i in range(0, len(value), 8)]
            return [
                names.setdefault(word, f"other {next(count)}") if word >= 1 << 32 else word
                for word in words
            ]

        launches, self.launches = self.launches, []
        return [(config, [named(value) for value in values]) for config, values in launches]


def _cases():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield dict(dtype=bf16, adapter=bf16, m=1000, r=16, gate=None, bias=False, expanded=True)
    yield dict(dtype=bf16, adapter=fp32, m=4096, r=16, gate=torch.ones(()), bias=False)
    yield dict(dtype=bf16, adapter=fp32, m=512, r=8, gate=None, bias=False, frozen_A=True)
    yield dict(dtype=fp16, adapter=fp32, m=512, r=5, gate=torch.ones(5, 2)[:, 0], bias=True)


def record(folder: Path) -> None:
    """Print the launches of both launchers, and how often a plan was made, as lines of JSON."""
    cuda = _stand_in_cuda(folder)
    shim = _build(folder, "libtorch_cuda.so", TORCH_SOURCE)  # noqa: F841, stays loaded
    from triton.runtime import driver

    from deltadiff.kernels.lora_linear import hopper_launch as hopper
    from deltadiff.kernels.lora_linear import hopper_plan
    from deltadiff.ops.backends import LAUNCHERS

    stand_in = _Driver()
    driver.set_active(stand_in)
    notes = _Notes(cuda, stand_in)
    hopper.multiprocessors = lambda device: 132
    plans, make_plan = [], hopper_plan.lora_linear_plan
    hopper_plan.lora_linear_plan = lambda *args: plans.append(1) or make_plan(*args)
    gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    assert "hopper" in LAUNCHERS

    last = *NO_DROPOUT, "hopper"

    def forward(*args):
        return torch.ops.deltadiff.lora_linear_fwd.default.redispatch(gpu, *args, *last)

    def backward(*args):
        return torch.ops.deltadiff.lora_linear_bwd.default.redispatch(gpu, *args, *last)

    def both(launchers, case):
        m, n, k, r, gate = case["m"], 512, 768, case["r"], case["gate"]
        x, w, dy, bias = (
            torch.zeros(s, dtype=case["dtype"]) for s in ((m, k), (n, k), (m, n), (n,))
        )
        dy = dy[:1].expand_as(dy) if case.get("expanded") else dy
        a, b = (torch.zeros(s, dtype=case["adapter"]) for s in ((r, k), (n, r)))
        inputs = dict(x=x, w=w, a=a, b=b, dy=dy, bias=bias)
        inputs |= {} if gate is None else {"gate": gate}
        fwd, bwd = launchers
        y, kept = fwd(x, w, a, b, 1.7, gate, bias if case["bias"] else None)
        found = notes.taken(**inputs, y=y, kept=kept)
        need_A = not case.get("frozen_A")
        given = dy, x if need_A else None, w, a, b, kept, 1.7, gate, [True, need_A, True, False]
        dx, da, db, _ = bwd(*given)
        inputs |= {"da": da} if need_A else {}
        return found + notes.taken(**inputs, kept=kept, dx=dx, db=db)

    native, python = (forward, backward), (hopper.lora_linear_fwd, hopper.lora_linear_bwd)
    calls = []
    hopper.lora_linear_fwd = lambda *args: calls.append("fwd") or python[0](*args)
    hopper.lora_linear_bwd = lambda *args: calls.append("bwd") or python[1](*args)
    for case in _cases():
        facts = {"native": both(native, case)}
        facts["plans"] = len(plans)
        facts["again"] = both(native, case)
        facts["python calls"] = list(calls)
        facts["python"] = both(python, case)
        facts["plans again"] = len(plans)
        plans.clear()
        print(json.dumps(facts), flush=True)

    case = next(_cases())
    capturing = ctypes.c_int.in_dll(cuda, "capturing")
    capturing.value = 1
    both(native, case)
    capturing.value = 0
    facts = {"python calls in a capture": list(calls), "plans": len(plans)}
    both(native, case | {"m": 1001})
    facts["plans of new tokens"] = len(plans)
    facts["python calls"] = list(calls)
    stand_in.loaded.clear()
    both(native, case | {"m": 255})
    facts["kernels of few tokens"] = stand_in.loaded
    facts["plans with few tokens"] = len(plans)
    ctypes.c_int.in_dll(cuda, "result").value = 2
    try:
        both(native, case)
    except RuntimeError as error:
        facts["error"] = str(error)
    print(json.dumps(facts), flush=True)


# ----------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    if torch.version.cuda:
        pytest.skip("needs a PyTorch without CUDA, which the stand-ins would be mixed up with")
    folder = tmp_path_factory.mktemp("cuda")
    cache = str(folder / "cache")
    return records_of(
        __file__, str(folder), TRITON_LIBCUDA_PATH=str(folder), TRITON_CACHE_DIR=cache
    )


def test_launches_are_tritons_own(recorded):
    *cases, _ = recorded
    assert len(cases) == len(list(_cases()))
    for facts, case in zip(cases, _cases(), strict=True):
        packed = case["adapter"] != case["dtype"]
        assert len(facts["native"]) == (4 if packed else 2)
        assert facts["native"] == facts["python"]
        assert facts["python calls"] == []
        for config, _ in facts["native"]:
            assert config[7] == STREAM
        # The kernel reads a dense gate: another one is copied.
        gate, addresses = case["gate"], [value for _, values in facts["native"] for value in values]
        assert (["gate"] in addresses) == (gate is not None and gate.is_contiguous())


def test_a_plan_is_made_once_for_each_kind_of_call(recorded):
    *cases, others = recorded
    for facts in cases:
        assert facts["plans"] == facts["plans again"] == 2
        assert facts["again"] == facts["native"]
    assert others["plans of new tokens"] == 2


def test_python_launches_into_graphs(recorded):
    others = recorded[-1]
    assert others["python calls in a capture"] == others["python calls"] == ["fwd", "bwd"]
    assert others["plans"] == 0


def test_few_tokens_go_to_the_kernel_that_dispatch_names(recorded):
    others = recorded[-1]
    assert "_lora_linear_few_kernel" in others["kernels of few tokens"]
    assert "_lora_linear_hopper_kernel" not in others["kernels of few tokens"]
    assert others["plans with few tokens"] == others["plans of new tokens"]


def test_errors_of_the_driver_are_raised(recorded):
    assert "cuLaunchKernelEx: out of luck (2)" in recorded[-1]["error"]


if __name__ == "__main__":
    record(Path(sys.argv[1]))
