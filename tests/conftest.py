"""No network, one thread, no hub: every test builds what it needs."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import ipaddress
import socket
import uuid
from typing import Any

import pytest
import torch
from hypothesis import settings

gc.set_threshold(100_000, 50, 100)  # the libraries' million objects stay; to look through them took a sixth of the time
torch.set_num_threads(1)
settings.register_profile("here", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("here")


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a unix socket
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return str(address[0]) == "localhost"


@pytest.fixture(autouse=True)
def _own_rewards(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rewards that someone trained on this machine are not seen, and none is left behind."""
    monkeypatch.setenv("DIFFALIGN_REWARDS", str(tmp_path_factory.getbasetemp() / "rewards" / uuid.uuid4().hex))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches beyond loopback fails, and says so."""
    for name in ("connect", "connect_ex"):
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, *, real: Any = real) -> Any:
            if not _is_local(address):
                raise OSError(f"a test reached for the network: {address}")
            return real(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)
    look_up = socket.getaddrinfo

    def local_names(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in (None, "", b"") and not _is_local((host if isinstance(host, str) else host.decode(),)):
            raise socket.gaierror(f"a test reached for the network: {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local_names)
