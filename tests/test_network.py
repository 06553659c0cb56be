from __future__ import annotations

import os
import socket

import pytest


def test_a_test_that_reaches_beyond_this_machine_fails_at_once() -> None:
    with pytest.raises(OSError, match="reached for the network"):
        socket.create_connection(("192.0.2.1", 80))
    with pytest.raises(OSError, match="reached for the network"):
        socket.create_connection(("example.org", 80))


def test_loopback_still_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    assert os.environ["HF_HUB_OFFLINE"] == "1"
