"""Launches without Triton's inspection of every argument, which costs more than the launch."""

import torch
import triton

_compiled: dict[tuple, object] = {}


def launch_cached(kernel, grid: tuple[int, ...], key, *args, **options) -> None:
    """``kernel[grid](*args, **options)``, compiled once for each ``key``.

    Args:
        kernel: a `triton.jit` or Gluon function.
        grid: one to three numbers.
        key: hashable. Together with the kernel and the device it determines everything that Triton
            specialises on: dtypes, constexprs, options, which arguments are None, and, unless the
            kernel opts out of it, which numbers are 1 or a multiple of 16 and which pointers are
            aligned.
        args: a value for every parameter of the kernel, in order, including constexprs.
        options: the compiler's options: num_warps, num_stages, ...
    """
    if triton.knobs.runtime.interpret or _has_hooks():
        kernel[grid](*args, **options)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    place = (kernel.fn, device, key)
    compiled = _compiled.get(place)
    if compiled is None:
        _compiled[place] = kernel[grid](*args, **options)
        return
    compiled.run(
        *grid, *(1,) * (3 - len(grid)), driver.get_current_stream(device),
        compiled.function, compiled.packed_metadata, None, None, None, *args,
    )  # fmt: skip


def specialisation(*args) -> tuple:
    """What Triton specialises on in these arguments, as a part of a key.

    That is the dtype of a tensor and whether its address is a multiple of 16; and of a number,
    whether it is 1, a multiple of 16, or too large for 32 bits.
    """
    return tuple(
        (arg.dtype, arg.data_ptr() % 16 == 0)
        if isinstance(arg, torch.Tensor)
        else (arg == 1, arg % 16 == 0, arg >= 2**31)
        for arg in args
    )


def _has_hooks() -> bool:
    """Whether someone, such as a profiler, has asked Triton to report launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)
