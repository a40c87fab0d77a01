"""Gluon's aggregates: several values of a kernel, with names, passed as one argument."""

from triton.experimental import gluon
from triton.language import core

if hasattr(gluon, "aggregate"):
    aggregate = gluon.aggregate
else:  # before Triton 3.8 it has a private name and writes no constructor

    def aggregate(cls):
        """Makes a class of annotated fields an aggregate, built from their values in order."""
        fields = tuple(cls.__annotations__)

        def construct(self, *values):
            for field, value in zip(fields, values, strict=True):
                setattr(self, field, value)

        construct.__triton_builtin__ = True  # the constructor is not compiled
        cls.__init__ = construct
        return core._aggregate(cls)
