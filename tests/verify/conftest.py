"""All tests of `deltadiff verify` run on one thread."""

import pytest
from threads import single_thread


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield
