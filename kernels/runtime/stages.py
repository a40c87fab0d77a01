"""Stages of shared memory that one warp fills and others empty in turn, each with two barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def wait_empty(empty, it, STAGES: gl.constexpr):
    """For who fills them: the stage of iteration ``it``, once it may be filled."""
    i = it % STAGES
    mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
    return i


@gluon.jit
def wait_ready(ready, it, STAGES: gl.constexpr):
    """For who empties them: the stage of iteration ``it``, once it is filled."""
    i = it % STAGES
    mbarrier.wait(ready.index(i), (it // STAGES) & 1)
    return i
