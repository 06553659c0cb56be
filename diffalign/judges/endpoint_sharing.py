"""Many questions at once: those that are kept or asked already cost nothing, the others draw on the same few slots."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.errors import OutputError
from diffalign.judges.endpoint_line import Line
from diffalign.judges.endpoint_sending import Refused, Sender, Told
from diffalign.judges.forking import renewed_in_forks
from diffalign.judges.request_cache import RequestCache

NOT_FINITE = Told(problem="a picture holds NaN or infinity")
NOBODY = Told(problem="not asked: the server did not answer the first question")


@dataclass(frozen=True)
class Asked:
    """A question: what its answer is kept as, by the way it is found, and how it is sent."""

    keys: dict[str, str]
    labels: int  # how many shares the answer has; 0 for a text
    send: Callable[[], Awaitable[Told]]


@dataclass
class _Going:
    """A request that several may wait for."""

    task: asyncio.Task[Told]
    waiting: int = 0


class Sharing:
    """Finds the answers to questions, from several threads at once."""

    def __init__(self, line: Line, sender: Sender, cache: RequestCache) -> None:
        self.answered = 0  # without a request
        self._line, self._sender, self._cache = line, sender, cache
        self._keeping, self._proved = True, False  # until the cache fails, and whether it ever worked
        self._renew()
        renewed_in_forks(self)

    def _renew(self) -> None:
        self._counting = threading.Lock()
        self.going: dict[str, _Going] = {}

    def answers(self, asked: Sequence[Asked | None], *, choosing: bool = False) -> list[Told]:
        """From the cache, else from the server; `choosing` is whether the first answer may decide how to ask."""
        kept = self._looked_up([key for one in asked if one for key in one.keys.values()])
        found = [NOT_FINITE if one is None else _known(one, kept) for one in asked]
        rows = [k for k, told in enumerate(found) if told is None]
        missing = [one for k in rows if (one := asked[k]) is not None]
        self._count(sum(told is not None and told is not NOT_FINITE for told in found))
        if missing:
            try:
                came = self._line.run(lambda: self._sent(missing, choosing))
            finally:
                while self._sender.news:
                    warnings.warn(self._sender.news.popleft(), stacklevel=4)
            for k, told in zip(rows, came, strict=True):
                found[k] = told
        return [told or NOBODY for told in found]

    def _looked_up(self, keys: Sequence[str]) -> dict[str, Any]:
        """What is kept; a cache that never worked is an error, one that fails later knows nothing."""
        try:
            found = self._cache.lookup(keys)
            self._proved = True
        except OutputError as e:
            if not self._proved:
                raise
            found = {}
            if self._keeping:
                self._keeping = False
                warnings.warn(f"{e} From here on no answer is kept.", stacklevel=4)
        return found

    async def _sent(self, asked: Sequence[Asked], choosing: bool) -> list[Told]:
        found, refused = [NOBODY] * len(asked), list[Refused]()
        rows = iter(range(len(asked)))

        async def next_one() -> Told | None:
            k = next(rows, None)
            if k is None:
                return None
            try:
                found[k] = await self._shared(asked[k])
            except Refused as e:  # one question that a working server does not like has no answer; others have
                refused.append(e)
                found[k] = Told(problem=e.said)
                if len(refused) >= self._line.concurrency and not self._line.good:
                    raise
            return found[k]

        async def work() -> None:
            while await next_one() is not None:
                pass

        while choosing and self._sender.way is None and (told := await next_one()) is not None:
            if told.lost:
                return found
        # More than the line has slots: one that waits for its next try has none.
        workers = [asyncio.ensure_future(work()) for _ in range(min(len(asked), 4 * self._line.concurrency))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if refused and not self._line.good:
            raise refused[0]
        return found

    async def _shared(self, one: Asked) -> Told:
        """The answer to a question; two who ask the same at once wait for one request."""
        key = next(iter(one.keys.values()))
        going = self.going.get(key)
        if going is None or going.task.get_loop() is not asyncio.get_running_loop():
            going = self.going[key] = _Going(asyncio.ensure_future(self._kept(one)))
        else:
            self._count(1)
        going.waiting += 1
        try:
            return await asyncio.shield(going.task)
        finally:
            going.waiting -= 1
            if not going.waiting:
                going.task.cancel()
                if self.going.get(key) is going:
                    del self.going[key]

    def _count(self, answered: int) -> None:
        with self._counting:
            self.answered += answered

    async def _kept(self, one: Asked) -> Told:
        if known := _known(one, await self._cached(self._cache.lookup, list(one.keys.values())) or {}):
            self._count(1)  # it came in the meantime
            return known
        told = await one.send()
        if told.sound and told.way in one.keys:
            await self._cached(self._cache.store, one.keys[told.way], told.value)
        return told

    async def _cached(self, use: Callable[..., Any], *given: Any) -> Any:
        """What the cache does in a thread, as SQLite may wait; once it fails it is left alone, and nothing is lost."""
        if self._keeping:
            try:
                return await asyncio.to_thread(use, *given)
            except OutputError as e:
                if self._keeping:
                    self._keeping = False
                    self._sender.news.append(f"{e} From here on no answer is kept.")
        return None


def _known(one: Asked, kept: dict[str, Any]) -> Told | None:
    """The answer that is kept, if it has the form that was asked for; the file may hold anything."""
    for way, key in one.keys.items():
        value = kept.get(key)
        sound = _is_shares(value, one.labels) if one.labels else _is_reply(value)
        if sound:
            return Told(value, way)
    return None


def _is_reply(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("text", "problem"))


def _is_shares(value: Any, count: int) -> bool:
    if not isinstance(value, list) or len(value) != count:
        return False
    sound = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in value)
    return sound and abs(sum(value) - 1) < 1e-6
