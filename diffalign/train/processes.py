"""Several processes as one run: what the launcher started, and an end for all of them where one ends.

Every process holds a socket to process 0. The system closes it when its owner dies, however that happens, so a loss is
known at once, also by a process that samples for minutes or waits in an exchange that will never come.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.errors import ConfigError, DiffalignError, ModelError

MEETING = 120.0  # seconds in which all processes must have found process 0
GRACE = 3.0  # seconds in which the loss of a process is known, where an exchange fails for it
CODE = 2  # exit code where another process is the reason
GONE = (
    "{name} ended without a word, as a process does that is killed or finds no memory. The others cannot go on without "
    "it and end too. The last checkpoint is whole: run the same command again to continue from it (--resume auto)."
)


def launched() -> int:
    """How many processes the launcher started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_group() -> None:
    """Refuse to run alone where a launcher was asked for more, which on a machine without GPUs it does not tell."""
    alone = "LOCAL_RANK" not in os.environ and launched() == 1
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes but started one, as it does without several GPUs. Use "
            "accelerate launch --multi_gpu --num_processes 2 -m diffalign train ..., which works on CPUs too."
        )


def on_cpu(device: Any) -> bool:
    """Whether Accelerate has to be told that this run computes on CPUs."""
    return launched() > 1 and torch.device(device).type == "cpu"


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Run a block that ends in every process when it fails in one, with the same message."""
    if accelerator.num_processes == 1:
        yield
        return
    line = Lifeline(int(accelerator.process_index), int(accelerator.num_processes))
    line.connect()
    try:
        yield
    except BaseException as error:
        line.failed(error)
        raise
    line.done()


@dataclass
class Link:
    """A socket to another process, and who that is."""

    socket: socket.socket
    lines: Any  # what comes from there
    name: str

    def say(self, kind: str, text: str = "") -> None:
        with contextlib.suppress(OSError):  # who has gone needs no word
            self.socket.sendall(json.dumps([kind, text]).encode() + b"\n")


class Lifeline:
    """What tells this process that another one has failed or died."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        self.links: list[Link] = []  # of process 0: to all others; of the others: to process 0
        self.threads: list[threading.Thread] = []
        self._over = threading.Event()
        self._ending = threading.Lock()

    def connect(self) -> None:
        """Meet all other processes; every process calls it."""
        from accelerate.utils import broadcast_object_list

        if self.rank:
            place: list[Any] = [None, None]
            broadcast_object_list(place)
            self._join(*place)
        else:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == self.processes
            with socket.create_server(("127.0.0.1" if here else "", 0)) as server:
                place = [[_host(), server.getsockname()[1]], secrets.token_hex(16)]
                broadcast_object_list(place)
                self._welcome(server, place[1])
        for link in self.links:
            self.threads.append(threading.Thread(target=self._listen, args=(link,), daemon=True))
            self.threads[-1].start()

    def failed(self, error: BaseException) -> None:
        """Tell the others why this process ends; where it ends because another one died, say that instead."""
        if not isinstance(error, DiffalignError | KeyboardInterrupt | SystemExit):
            time.sleep(GRACE)  # an exchange with a dead process raises some error of its backend
        self._over.set()
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        for link in self.links:
            link.say("failed", f"process {self.rank} ended with {kind}")

    def done(self) -> None:
        """Part from the others in peace."""
        self._over.set()
        for link in self.links:
            link.say("done")
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
        for thread in self.threads:
            thread.join(GRACE)

    def _welcome(self, server: socket.socket, token: str) -> None:
        """Wait for every other process; a stranger, who lacks the token, is sent away."""
        server.settimeout(MEETING)
        while len(self.links) < self.processes - 1:
            try:
                link = server.accept()[0]
                link.settimeout(MEETING)
                given, name = json.loads((lines := link.makefile("r")).readline())
            except TimeoutError as e:
                raise ModelError(
                    f"only {len(self.links) + 1} of {self.processes} processes came together in {MEETING:.0f} s. Look "
                    "for the error of those that are missing, then start again."
                ) from e
            except (OSError, ValueError):
                continue
            if secrets.compare_digest(str(given), token):
                self.links.append(_watched(link, lines, str(name)))
                self.links[-1].say("here", self._name)
            else:
                link.close()

    def _join(self, address: list[Any], token: str) -> None:
        link = socket.create_connection((address[0], address[1]), timeout=MEETING)
        link.sendall(json.dumps([token, self._name]).encode() + b"\n")
        self.links.append(_watched(link, link.makefile("r"), "process 0"))

    @property
    def _name(self) -> str:
        return f"process {self.rank} (pid {os.getpid()} on {socket.gethostname()})"

    def _listen(self, link: Link) -> None:
        """Wait for the last word of another process, or for the silence after it."""
        try:
            for line in link.lines:
                kind, text = json.loads(line)
                if kind == "done":
                    return
                if kind == "here":
                    link.name = text
                else:
                    return self._end(text, link)
        except (OSError, ValueError):
            pass
        self._end(GONE.format(name=link.name), link)

    def _end(self, reason: str, source: Link) -> None:
        """End this process at once: its main thread may be in a call that never returns."""
        with self._ending:
            if self._over.is_set():
                return
            for link in self.links:
                if link is not source:
                    link.say("failed", reason)
            print(f"\nstopped: {reason}", file=sys.stderr, flush=True)
            os._exit(CODE)


def _host() -> str:
    """Where process 0 is met."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _watched(link: socket.socket, lines: Any, name: str) -> Link:
    """A link that also notices within half a minute when the other machine is gone."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Link(link, lines, name)
