"""A real HTTP server on loopback that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from diffalign.judges.endpoint import EndpointJudge


@dataclass
class Says:
    """One answer; `cut` promises more bytes than it sends, `hangs_up` sends none at all."""

    body: Any = b""  # bytes as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    cut: bool = False
    hangs_up: bool = False


Script = Callable[[str, Any, int], Says]  # path, JSON body (None for a GET), which request of all


@dataclass
class Heard:
    """The address, and what was asked."""

    url: str
    paths: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    @property
    def posts(self) -> list[Any]:
        return [body for body in self.bodies if body is not None]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5 the kernel drops some of those who come at once, for a second
    daemon_threads = True


@contextmanager
def serving(script: Script) -> Iterator[Heard]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            with lock:
                heard.paths.append(self.path)
                heard.bodies.append(body)
                heard.keys.append(self.headers.get("Authorization"))
                count = len(heard.paths) - 1
            says = script(self.path, body, count)
            if says.hangs_up:
                self.close_connection = True
                self.connection.close()
                return
            sent = says.body if isinstance(says.body, bytes) else json.dumps(says.body).encode()
            self.send_response(says.status)
            for name, value in says.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(sent) + 100 * says.cut))
            self.end_headers()
            self.wfile.write(sent)
            self.close_connection |= says.cut

        def handle(self) -> None:
            with suppress(OSError):  # the client hung up
                super().handle()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    server = _Server(("127.0.0.1", 0), Handler)
    heard = Heard(f"http://127.0.0.1:{server.server_address[1]}/v1#judge")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        server.shutdown()
        server.server_close()


def chat(text: Any = "fine", finish: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}


def likely(**logprobs: Any) -> dict[str, Any]:
    """Log-probabilities of a first token in the form of vLLM."""
    top = [{"token": token.replace("_", " "), "logprob": p, "bytes": None} for token, p in logprobs.items()]
    return {"content": [{**top[0], "top_logprobs": top}]}


def always(says: Says) -> Script:
    return lambda path, body, count: says


def judge(url: str, **settings: Any) -> EndpointJudge:
    """One that asks the script, keeps nothing and tries twice."""
    return EndpointJudge(url, **{"cache": False, "retries": 1, "timeout": 5.0, **settings})
