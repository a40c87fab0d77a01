"""Launch a kernel again without Triton's look at every argument, which costs more than that."""

import triton

_compiled: dict[tuple, object] = {}


def launch(kernel, grid: tuple[int, ...], key, *args, **options) -> None:
    """``kernel[grid](*args, **options)``, compiled once for each ``key``.

    Args:
        kernel: a `triton.jit` or Gluon function.
        grid: one to three numbers.
        key: hashable; with the kernel and the device it settles all that Triton specialises on:
            dtypes, constexprs, options, which arguments are None, and what `triton.jit` was not
            told to leave alone (numbers that are 1 or a multiple of 16, alignment of pointers).
        args: of every parameter of the kernel, in order, constexprs too.
        options: of the compiler: num_warps, num_stages, ...
    """
    if triton.knobs.runtime.interpret or _hooked():
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


def _hooked() -> bool:
    """Whether someone, a profiler for one, wants to be told of launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)
