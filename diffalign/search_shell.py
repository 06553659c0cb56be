"""The shell that search pipelines share: stock arguments and ours told apart, then the search, with frozen weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from diffalign import scoring
from diffalign.restore import frozen
from diffalign.searching import Method, Options, Session
from diffalign.shell import Shell


class SearchShell(Shell):
    """A drop-in pipeline whose call runs search methods; its `__call__` names what the method itself takes."""

    METHOD: ClassVar[str]  # also the keyword of its config
    ADVANCED = ("kernel", "noise_level", "rows_at_once", "reward_chunk", "score_cache", "keep")

    @classmethod
    def knows(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """What `method` takes beside these settings."""
        made: Any = cls
        return tuple(inspect.signature(made.method).parameters)[1:]

    def search(
        self, args: Sequence[Any], kwargs: dict[str, Any], method: Method, *, reward: Any, **options: Any
    ) -> Any:
        """The search by one method; the stock call itself where there is no reward."""
        if reward is None:
            for name in self.ADVANCED:
                kwargs.pop(name, None)
            return self.call_stock(*args, **kwargs)
        return self.search_in_turn(args, kwargs, self.METHOD, [(method, 1.0)], reward=reward, **options)

    def search_in_turn(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        name: str,
        methods: Sequence[tuple[Method, float]],
        *,
        reward: Any,
        **options: Any,
    ) -> Any:
        """Methods with their shares of the budget; each may start from the noise the one before found best."""
        extra = {key: kwargs.pop(key) for key in self.ADVANCED if key in kwargs}
        made = scoring.make_reward(reward)
        scoring.require_rowwise(made, f"method '{name}'")
        session = Session(self, args, kwargs, Options(reward=made, **options, **extra))
        with torch.no_grad(), frozen(session.chain.driver.modules.values()):
            return session.run(name, methods)
