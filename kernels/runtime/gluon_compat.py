"""What kernels in Gluon need of it: names that differ between Triton 3.6 and later versions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

# The type of a field of an aggregate that may be None, which is a constexpr in a kernel.
optional = gl.tensor | gl.constexpr

# Waits for all threads of a block.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6

# Copies by TMA between a descriptor's tensor and shared memory.
if hasattr(tma, "async_load"):
    tma_load, tma_store = tma.async_load, tma.async_store
else:  # Triton 3.6 and 3.7
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

# reinterpret(buffer, dtype, shape, layout): another view of the same shared memory.
_buffer = gl.shared_memory_descriptor
if hasattr(_buffer, "reinterpret"):
    reinterpret = _buffer.reinterpret
else:  # Triton 3.6 and 3.7
    reinterpret = _buffer._reinterpret

if hasattr(gluon, "aggregate"):
    aggregate = gluon.aggregate
else:  # Triton 3.6 and 3.7, where aggregates have no constructor of their own

    def aggregate(cls):
        """Make a class with annotated fields an aggregate: several values of a kernel in one.

        Its constructor takes the values of the fields in order.
        """
        fields = tuple(cls.__annotations__)

        def construct(self, *values):
            for field, value in zip(fields, values, strict=True):
                setattr(self, field, value)

        construct.__triton_builtin__ = True  # it runs while Triton compiles, and is not compiled
        cls.__init__ = construct
        return core._aggregate(cls)
