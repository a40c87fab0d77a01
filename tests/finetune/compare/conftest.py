"""A finished comparison, which no test changes, for all tests of `deltadiff compare`."""

import sys

import pytest
from comparisons import compare, load
from threads import single_thread


@pytest.fixture(scope="session")
def done(bert, reviews, tmp_path_factory):
    """A comparison that ran, with a method that cannot: (folder, records)."""
    output = tmp_path_factory.mktemp("compare") / "out"
    # Records name the number of threads, and the tests of this folder run on one.
    with pytest.MonkeyPatch.context() as patch, single_thread():
        patch.setitem(sys.modules, "adapters", None)
        words = ["--methods", "full", "lora,delta-lora", "houlsby", "--seeds", 2]
        assert compare(bert, reviews, output, *words, "--start-step", 1) == 0
    return output, load(output)
