"""The line to a server: one event loop in a thread of its own, so that an interrupted call leaves nothing running."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import threading
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from diffalign.errors import ConfigError, MissingExtra
from diffalign.judges.endpoint_answer import AGAIN, Answer, line, message, pause_of, written
from diffalign.judges.endpoint_breaker import Breaker
from diffalign.judges.forking import renewed_in_forks

Found = TypeVar("Found")
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries; it doubles
MOST_PATIENCE = 120.0  # seconds; a server that asks for a longer pause is not waited for
TO_CONNECT = 10.0  # seconds
LEAST_SECRET = 8  # characters; a shorter key hides nothing, and may be a word of an honest answer
_NO_ONE = ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")
_HERE = ("localhost", "127.0.0.1", "::1")
_GIVEN_UP = Answer(whole="not asked: the server stopped answering", again=True)
_alone: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by address, over all judges of this process


@dataclass
class _Running:
    """The loop, its thread and what lives on it."""

    loop: asyncio.AbstractEventLoop
    process: int = field(default_factory=os.getpid)
    client: Any = None
    slots: asyncio.Semaphore = field(default_factory=asyncio.Semaphore)
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)  # for requests that must not meet each other
    probe: asyncio.Lock = field(default_factory=asyncio.Lock)  # for those to a server that was given up


class Line:
    """Sends requests, so many at once over all threads that use it, and tries again where that may help."""

    def __init__(self, url: str, key: str, *, concurrency: int, retries: int, timeout: float) -> None:
        self.url, self._key, self.timeout = url, key, timeout
        self.concurrency, self.retries = concurrency, retries
        self.requests = 0  # sent so far, second tries included
        self.reached = False  # whether the server ever said anything
        self.good = False  # whether it ever answered a question
        patience = sum(_wait(k) for k in range(retries))
        self._breaker = Breaker(max(2, concurrency) * (retries + 1), patience)
        self._lock = threading.Lock()
        self._running: _Running | None = None
        renewed_in_forks(self)

    def _renew(self) -> None:
        self._lock, self._running = threading.Lock(), None
        _alone.clear()

    def run(self, work: Callable[[], Coroutine[Any, Any, Found]]) -> Found:
        """The result of `work` on the loop; if the caller is interrupted, so is the work."""
        with self._lock:  # so that the loop is not stopped before the work is on it
            loop = self._start().loop
            future = asyncio.run_coroutine_threadsafe(work(), loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as e:
            raise ConfigError(
                f"the judge at {self.url} was closed while it was asked. Close it when all questions have answers."
            ) from e
        except BaseException:
            future.cancel()
            raise

    async def post(self, path: str, make: Callable[[], Mapping[str, Any]]) -> Answer:
        """The answer to a JSON request, after as many tries as it takes and is allowed; `make` is called for each."""

        async def send(client: Any, body: Any) -> Any:
            return await client.post(path, cast_to=object, body=body)

        answer = await self._tries(send, lambda: written(make()))
        self.good |= answer.status == 200 and not answer.whole
        return answer

    async def get(self, path: str) -> Answer:
        """The answer to a question about the server itself."""

        async def send(client: Any, body: Any) -> Any:
            return await client.get(path, cast_to=object)

        return await self._tries(send, None)

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """For requests that must not meet each other at this address, whichever judge of this process sends them."""
        lock = _alone[self.url]
        async with self._here.alone:
            while not lock.acquire(blocking=False):  # waiting for it in a thread could not be cancelled
                await asyncio.sleep(0.01)
            try:
                yield
            finally:
                lock.release()

    def hidden(self, content: Any, least: int = LEAST_SECRET) -> Any:
        """The same without the key, in whatever strings it stands; a key shorter than `least` is left there."""
        if len(self._key) < least or self._key == "none":
            return content
        if isinstance(content, str):
            return content.replace(self._key, "***").replace(json.dumps(self._key)[1:-1], "***")
        if isinstance(content, dict):
            return {self.hidden(name, least): self.hidden(value, least) for name, value in content.items()}
        return [self.hidden(value, least) for value in content] if isinstance(content, list) else content

    def close(self) -> None:
        """End the thread; the next request starts another."""
        with self._lock:
            if self._running is not None:
                _stop(self._running)
                self._running = None

    async def _tries(self, send: Callable[[Any, Any], Any], make: Callable[[], Any] | None) -> Answer:
        running = self._here
        if self._breaker.open:
            async with running.probe:  # those who come meanwhile wait for what this one finds
                if self._breaker.resting:
                    return _GIVEN_UP
                if self._breaker.open:
                    return await self._try(running, send, make, probing=True)
        for attempt in range(self.retries + 1):
            answer = await self._try(running, send, make)
            if not answer.again or attempt == self.retries or self._breaker.open:
                break
            if answer.unreachable and not self.reached:
                break  # nobody was ever there
            if answer.pause is not None and answer.pause > MOST_PATIENCE:
                break
            wait = _wait(attempt) * random.uniform(0.5, 1.0)
            await asyncio.sleep(wait if answer.pause is None else answer.pause + wait / 10)
            if self._breaker.open:
                break
        return answer

    async def _try(
        self, running: _Running, send: Callable[[Any, Any], Any], make: Callable[[], Any] | None, probing: bool = False
    ) -> Answer:
        """One try in a slot of its own; the body lives no longer than that."""
        async with running.slots:
            if self._breaker.open and not probing:
                return _GIVEN_UP
            body = None if make is None else await asyncio.to_thread(make)
            self.requests += make is not None
            answer = await self._once(running, lambda client: send(client, body))
        self.reached |= answer.status > 0
        self._breaker.note(answer.status)
        return answer

    async def _once(self, running: _Running, send: Callable[[Any], Any]) -> Answer:
        openai = _openai()
        try:
            async with asyncio.timeout(self.timeout):  # of the whole answer, however slowly it trickles
                content = await send(self._client(running))
            return Answer(200, self.hidden(content))
        except (openai.APITimeoutError, TimeoutError) as e:
            missed = type(e.__cause__).__name__ in _NO_ONE
            return Answer(whole=f"no answer within {self.timeout:g} s", unreachable=missed, again=True)
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            said = self.hidden(line(f"{type(cause).__name__}: {cause}"), 1)
            return Answer(whole=f"connection lost: {said}", unreachable=type(cause).__name__ in _NO_ONE, again=True)
        except openai.APIStatusError as e:
            said = self.hidden(line(message(self.hidden(e.body, 1), e)), 1)
            pause = pause_of(e.response.headers)
            again = e.status_code in AGAIN
            return Answer(e.status_code, whole=f"HTTP {e.status_code}: {said}", again=again, pause=pause)
        except Exception as e:  # whatever else a server's answer did to the client, it is no answer
            return Answer(200, whole=f"no readable answer: {self.hidden(line(f'{type(e).__name__}: {e}'), 1)}")

    def _client(self, running: _Running) -> Any:
        if running.client is None:
            openai = _openai()
            patience = openai.Timeout(self.timeout, connect=TO_CONNECT)
            # A proxy of the environment is for the world outside; httpx would ask it for this machine too.
            own = {"http_client": _direct(openai)} if urlsplit(self.url).hostname in _HERE else {}
            made = openai.AsyncOpenAI(base_url=self.url, api_key=self._key, max_retries=0, timeout=patience, **own)
            running.client = made
        return running.client

    @property
    def _here(self) -> _Running:
        """What the work that asks runs on; work of a loop that was closed ends."""
        running = self._running
        if running is None or running.loop is not asyncio.get_running_loop():
            raise asyncio.CancelledError
        return running

    def _start(self) -> _Running:
        """The loop of this process; the caller holds the lock."""
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


def _direct(openai: Any) -> Any:
    made = getattr(openai, "DefaultAsyncHttpx2Client", None) or openai.DefaultAsyncHttpxClient
    return made(trust_env=False)


def _wait(attempt: int) -> float:
    return float(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))
