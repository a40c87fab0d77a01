"""What the tests of model families share."""

import socket

import pytest
from families import FAMILIES


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    """Each family of the table."""
    return request.param


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that asks the network for anything fails."""

    def refuse(_, address):
        raise AssertionError(f"the network was asked: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
