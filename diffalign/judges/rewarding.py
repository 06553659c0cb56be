"""A judge as a reward: what every reward that asks one shares."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError
from diffalign.judges.asking import Backend, Judgement
from diffalign.judges.finding import EMBEDDED, find_judge
from diffalign.judges.forking import renewed_in_forks
from diffalign.judges.secrets import without_secrets
from diffalign.score_cache import engine_version
from diffalign.scoring import Score

KEPT = 512  # judgements that a reward remembers


class JudgeReward:
    """Turns judgements into a Score and keeps what the judge wrote.

    `judge` is `shapes-vlm`, a hub id or folder of an image-text-to-text model, the address of a server
    (`http://127.0.0.1:8000/v1#model`), a mapping with more settings, or a backend. `log` is a JSONL file that every
    judgement is added to.
    """

    modality = "image"
    differentiable = False
    no_gradient = "it reads what a judge writes"
    reads_prompt = True
    range: tuple[float, float] | None = None
    name = "judge"
    revision = "1"  # of our computation

    def __init__(self, judge: str | Mapping[str, Any] | Backend = EMBEDDED, log: str | None = None) -> None:
        self._spec, self.log = judge, Path(log).expanduser() if log else None
        self.judgements: deque[tuple[Case, Judgement]] = deque(maxlen=KEPT)  # the latest, oldest first
        self._lock = threading.Lock()
        renewed_in_forks(self)

    def _renew(self) -> None:
        """Locks of its own, its subclass's included."""
        self.__dict__.update({name: threading.Lock() for name, value in self.__dict__.items() if _is_lock(value)})

    def __getstate__(self) -> dict[str, Any]:
        """Its settings without the judge's key, which another process reads from its environment."""
        state = {name: value for name, value in self.__dict__.items() if name != "backend" and not _is_lock(value)}
        locks = [name for name, value in self.__dict__.items() if _is_lock(value)]
        kept = {"_spec": without_secrets(self._spec), "judgements": deque(maxlen=KEPT), "_locks": locks}
        return state | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update({name: threading.Lock() for name in self.__dict__.pop("_locks")})
        renewed_in_forks(self)

    def __deepcopy__(self, memo: Any) -> Self:
        """Another reward that asks the same judge."""
        state = {**self.__getstate__(), "_spec": None}
        made = type(self).__new__(type(self))
        made.__setstate__({**copy.deepcopy(state, memo), "_spec": self._spec})
        return made

    @property
    def judge_options(self) -> dict[str, Any]:
        """What `options` of every judge reward holds beside its own."""
        spec = self._spec
        return {"judge": without_secrets(spec) if isinstance(spec, str | Mapping) else type(spec).__qualname__}

    @cached_property
    def backend(self) -> Backend:
        return find_judge(self._spec)

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and which judge it asks."""
        return engine_version(self.revision, self.backend, self._spec)

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per row."""
        raise NotImplementedError

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        found = self.judge(media.detach(), cases)
        self._keep(cases, found)
        names = dict.fromkeys(name for one in found for name in one.parts)
        parts = {n: torch.tensor([one.parts.get(n, torch.nan) for one in found], device=media.device) for n in names}
        total = torch.tensor([one.total for one in found], dtype=torch.float32, device=media.device)
        return Score(total, parts)

    def _keep(self, cases: Sequence[Case], found: Sequence[Judgement]) -> None:
        with self._lock:
            self.judgements.extend(zip(cases, found, strict=True))
            if self.log is None:
                return
            rows = [
                {"reward": self.name, "prompt": case.prompt, "seed": case.seed, "valid": one.valid}
                | {"total": one.total if one.valid else None, "parts": _finite(one.parts), "raw": list(one.raw)}
                | ({"problem": one.problem} if one.problem else {})
                for case, one in zip(cases, found, strict=True)
            ]
            try:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            except OSError as e:
                raise ConfigError(f"cannot write the judge's log '{self.log}': {e}. Give `log` another path.") from e


def mark_of(backend: Backend) -> str:
    """What tells a judge that writes checks or rubrics from others: its version and settings."""
    return engine_version("written by", backend, None) or str(backend.version)


def require_decibel(value: float | None, who: str) -> None:
    """Refuse an `unedited_above` that nothing can be compared with."""
    if value is not None and math.isnan(value):
        raise ConfigError(f"{who}.unedited_above is {value}, but it is a PSNR in dB such as 50. Leave it out for none.")


def _finite(parts: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in parts.items()}


def _is_lock(value: Any) -> bool:
    return isinstance(value, type(threading.Lock()))


def instruction_of(case: Case) -> str:
    """What an edit was asked to do: the metadata's `instruction`, else the prompt."""
    told = case.metadata.get("instruction")
    return told if isinstance(told, str) and told.strip() else case.prompt
