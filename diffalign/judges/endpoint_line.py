"""The line to a server: one event loop in a thread of its own, so that an interrupted call leaves nothing running."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from diffalign.errors import MissingExtra
from diffalign.judges.endpoint_forms import shown

Found = TypeVar("Found")
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries; it doubles
MOST_PATIENCE = 120.0  # seconds; a server that asks for a longer pause is not waited for
TO_CONNECT = 10.0  # seconds
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 507, 529)  # statuses of a server that may answer later
_NO_ONE = ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")


@dataclass(frozen=True)
class Answer:
    """What came back from a server."""

    status: int = 0  # of HTTP; 0 where nothing came
    content: Any = None  # of a good answer
    problem: str = ""  # why there is none
    unreachable: bool = False  # nobody listens there
    again: bool = False  # whether another try may go better
    pause: float | None = None  # seconds that the server asks for


@dataclass
class _Running:
    """The loop, its thread and what lives on it."""

    loop: asyncio.AbstractEventLoop
    process: int = field(default_factory=os.getpid)
    client: Any = None
    slots: asyncio.Semaphore = field(default_factory=asyncio.Semaphore)
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)  # for requests that must not meet each other


class Line:
    """Sends requests, so many at once over all threads that use it, and tries again where that may help."""

    def __init__(self, url: str, key: str, *, concurrency: int, retries: int, timeout: float) -> None:
        self.url, self._key, self.timeout = url, key, timeout
        self.concurrency, self.retries = concurrency, retries
        self.requests = 0  # sent so far, second tries included
        self.reached = False  # whether the server ever said anything
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def run(self, work: Callable[[], Coroutine[Any, Any, Found]]) -> Found:
        """The result of `work` on the loop; if the caller is interrupted, so is the work."""
        loop = self._start().loop
        future = asyncio.run_coroutine_threadsafe(work(), loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """The answer to a JSON request, after as many tries as it takes and is allowed."""
        return await self._tries(lambda client: client.post(path, cast_to=object, body=dict(body)), counted=True)

    async def get(self, path: str) -> Answer:
        """The answer to a question about the server itself."""
        return await self._tries(lambda client: client.get(path, cast_to=object), counted=False)

    @property
    def alone(self) -> asyncio.Lock:
        """Held by requests that must not meet each other."""
        return self._start().alone

    def plain(self, text: str) -> str:
        """The text without the key."""
        return text if self._key == "none" else text.replace(self._key, "***")

    def close(self) -> None:
        """End the thread; the next request starts another."""
        with self._lock:
            if self._running is not None:
                _stop(self._running)
                self._running = None

    async def _tries(self, send: Callable[[Any], Any], *, counted: bool) -> Answer:
        running = self._start()
        async with running.slots:
            for attempt in range(self.retries + 1):
                self.requests += counted
                answer = await self._once(running, send)
                self.reached |= answer.status > 0
                if not answer.again or attempt == self.retries:
                    return answer
                if answer.pause is not None and answer.pause > MOST_PATIENCE:
                    return answer
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                await asyncio.sleep(wait if answer.pause is None else answer.pause + wait / 10)
        raise AssertionError("a request has at least one try")

    async def _once(self, running: _Running, send: Callable[[Any], Any]) -> Answer:
        openai = _openai()
        try:
            async with asyncio.timeout(self.timeout):  # of the whole answer, however slowly it trickles
                content = await send(self._client(running))
            return Answer(200, content)
        except (openai.APITimeoutError, TimeoutError) as e:
            missed = type(e.__cause__).__name__ in _NO_ONE
            return Answer(problem=f"no answer within {self.timeout:g} s", unreachable=missed, again=True)
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            said = self.plain(shown(f"{type(cause).__name__}: {cause}"))
            return Answer(problem=f"connection lost: {said}", unreachable=type(cause).__name__ in _NO_ONE, again=True)
        except openai.APIStatusError as e:
            said = self.plain(shown(_message(e)))
            pause = _pause(e.response.headers)
            return Answer(e.status_code, problem=f"HTTP {e.status_code}: {said}", again=_helps(e), pause=pause)
        except Exception as e:  # whatever else a server's answer did to the client, it is no answer
            return Answer(200, problem=self.plain(f"no readable answer: {shown(f'{type(e).__name__}: {e}')}"))

    def _client(self, running: _Running) -> Any:
        if running.client is None:
            openai = _openai()
            patience = openai.Timeout(self.timeout, connect=TO_CONNECT)
            made = openai.AsyncOpenAI(base_url=self.url, api_key=self._key, max_retries=0, timeout=patience)
            running.client = made
        return running.client

    def _start(self) -> _Running:
        """The loop of this process; a fork has none of its parent's threads."""
        with self._lock:
            if self._running is None or self._running.process != os.getpid():
                _openai()
                running = _Running(asyncio.new_event_loop(), slots=asyncio.Semaphore(self.concurrency))
                thread = threading.Thread(target=_serve, args=(running,), name="diffalign-judge", daemon=True)
                thread.start()
                weakref.finalize(self, _stop, running)
                self._running = running
            return self._running


def _openai() -> Any:
    try:
        import openai
    except ImportError as e:
        raise MissingExtra.of("a judge on a server", "the openai client", "judge") from e
    return openai


def _serve(running: _Running) -> None:
    """Run the loop until it is stopped, then leave nothing of it behind."""
    loop = running.loop
    asyncio.set_event_loop(loop)
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    with contextlib.suppress(Exception):
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        if running.client is not None:
            loop.run_until_complete(running.client.close())
    loop.close()


def _stop(running: _Running) -> None:
    if running.process == os.getpid() and not running.loop.is_closed():
        with contextlib.suppress(RuntimeError):  # it closed between the two lines
            running.loop.call_soon_threadsafe(running.loop.stop)


def _helps(error: Any) -> bool:
    return error.status_code in AGAIN


def _message(error: Any) -> str:
    """What the server itself says about an error."""
    body = error.body
    if isinstance(body, dict):
        told = body.get("message") or body.get("detail") or body.get("error") or body
        return told if isinstance(told, str) else repr(told)
    return str(body or error.response.text or error.message)


def _pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or the time from when on it answers."""
    told = headers.get("retry-after")
    if told is None:
        return None
    try:
        pause = float(told)
    except ValueError:
        try:
            pause = parsedate_to_datetime(told).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, pause) if math.isfinite(pause) else None
