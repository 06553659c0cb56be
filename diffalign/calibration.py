"""What a base model's images get from a reward: references per prompt and for all, in one JSON file with hashes.

"InfAlign: Inference-aware language model alignment", Balashankar et al., 2024 (arXiv 2412.19792): a reward says little
until it is compared with what the base model gets for the same prompt.

Where we differ: a prompt that was not measured is compared with the pool of all prompts, unless asked otherwise.
References belong to a prompt and, by a short hash after it, to what else of a case the reward reads: the metadata keys
and pictures that its `reads` names, and all pictures where it judges edits. Other metadata splits no prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign import atomic
from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward
from diffalign.score_cache import PICTURES, asked_of, identity_of
from diffalign.scoring import Composite, Reward, Score

SCHEMA = 1
LEVELS = 257  # values that stand for the pool of all prompts
Unseen = Literal["pooled", "invalid", "error"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The references of one reward on one base model; what follows from them is computed, not given."""

    reward: Mapping[str, Any]  # as `describe` gives it
    base: Mapping[str, Any]  # model, its version, and the call of the sampler
    prompts: Mapping[str, tuple[float, ...]]  # by `key_of`, ascending
    invalid: Mapping[str, int] = field(default_factory=dict)  # images per prompt that the reward could not judge

    @cached_property
    def values(self) -> Tensor:
        """Every reference (count,) in ascending order, float64."""
        return torch.tensor([v for row in self.prompts.values() for v in row], dtype=torch.float64).sort().values

    @cached_property
    def pooled(self) -> Tensor:
        """All references, or the middles of LEVELS equal shares of them where there are more."""
        count = len(self.values)
        middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) * count / LEVELS
        return self.values if count <= LEVELS else self.values[middles.long()]

    @property
    def count(self) -> int:
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        return math.fsum(self.values.tolist()) / self.count  # exact sums: the hash is the same on every machine

    @cached_property
    def std0(self) -> float:
        """Population deviation of all references, exactly 0 where they are one value."""
        squares = math.fsum((v - self.mean) ** 2 for v in self.values.tolist())
        return math.sqrt(squares / self.count) if self.values[0] < self.values[-1] else 0.0

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything the table says."""
        return _hash(self._content())

    def references(self, prompt: str, unseen: Unseen = "pooled") -> Tensor:
        """The references (K,) of a key, ascending; for one that was not measured the pool, none, or an error."""
        if found := self.prompts.get(prompt):
            return torch.tensor(found, dtype=torch.float64)
        if unseen == "error":
            raise ConfigError(
                f"reward '{self.reward['name']}' has no references for the prompt '{prompt[:80]}', and unseen is "
                "'error'. Score images of the base model for it with --calibrate, or set unseen to 'pooled'."
            )
        return self.pooled if unseen == "pooled" else self.pooled[:0]

    def rows(self, prompts: Sequence[str], unseen: Unseen = "pooled") -> Tensor:
        """The references of B keys as (B, K), filled up with NaN."""
        rows = [self.references(prompt, unseen) for prompt in prompts]
        if not rows:
            return torch.empty(0, 0, dtype=torch.float64)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)

    def merge(self, newer: Table) -> Table:
        """Both tables' prompts; one measured again has its new references. Refused where reward or base differ."""
        for what in ("reward", "base"):
            if differs := _difference(getattr(self, what), getattr(newer, what), what):
                raise ConfigError(
                    f"references of reward '{newer.reward['name']}' cannot be added to those already there, because "
                    f"{differs}: they would not be comparable. Give --calibrate another file."
                )
        old = {prompt: count for prompt, count in self.invalid.items() if prompt not in newer.prompts}
        return Table(
            reward=self.reward,
            base=self.base,
            prompts={**self.prompts, **newer.prompts},
            invalid={**old, **newer.invalid},
        )

    def _content(self) -> dict[str, Any]:
        about = {"reward": self.reward, "base": self.base}
        numbers = {"count": self.count, "mean": self.mean, "std0": self.std0, "invalid": dict(self.invalid)}
        prompts = {prompt: list(row) for prompt, row in self.prompts.items()}
        return {**about, **numbers, "pooled": self.pooled.tolist(), "prompts": prompts}


def measure(reward: Reward, base: Mapping[str, Any], cases: Iterable[Case], score: Score) -> Table:
    """The table of what `reward` said (B,) about images of the base model for these B cases."""
    keys = [key_of(reward, case) for case in cases]
    if len(keys) != len(score):
        raise ConfigError(f"there are {len(score)} scores for {len(keys)} cases; a table needs one for each.")
    if not score.valid.any():
        raise InvalidReward(
            f"reward '{reward.name}' is NaN for all {len(keys)} reference images, so there is nothing to compare "
            "with. Check that the images are finite and that the reward can read them."
        )
    prompts: dict[str, list[float]] = {}
    invalid: dict[str, int] = {}
    for key, total in zip(keys, score.total.tolist(), strict=True):
        prompts.setdefault(key, [])
        if math.isnan(total):
            invalid[key] = invalid.get(key, 0) + 1
        else:
            prompts[key].append(total)
    ascending = {prompt: tuple(sorted(row)) for prompt, row in prompts.items()}
    return Table(reward=describe(reward), base=_plain(base), prompts=ascending, invalid=invalid)


def key_of(reward: Reward, case: Case) -> str:
    """Under which key the references of a case stand: its prompt, and a hash of what else the reward reads of it."""
    try:
        asked = asked_of(case, reads_of(reward))
    except TypeError as e:
        raise ConfigError(
            f"what reward '{reward.name}' reads of the case '{case.prompt[:60]}' holds a {e}, which cannot be told "
            f"from another one, so neither can references. Give numbers, texts, lists or pictures."
        ) from e
    return f"{case.prompt} #{asked}" if asked else case.prompt


def reads_of(reward: Reward) -> tuple[str, ...]:
    """What a reward or its parts read of a case beside the prompt: metadata keys, and the names of its pictures."""
    own = tuple(getattr(getattr(reward, "function", reward), "reads", ()))
    if isinstance(reward, Composite):
        return tuple(sorted({*own, *(name for part in reward.rewards for name in reads_of(part))}))
    return tuple(sorted({*own, *(PICTURES if reward.modality == "edit" else ())}))


def describe(reward: Reward) -> dict[str, Any]:
    """What the scores of a reward depend on: its name, class, version and options, or those of its parts."""
    reads = {"reads": list(found)} if (found := reads_of(reward)) else {}
    options = getattr(reward, "options", None)
    if isinstance(reward, Composite) and isinstance(options, Mapping):
        kind = f"{type(reward).__module__}.{type(reward).__qualname__}"
        parts = [describe(part) for part in reward.rewards]
        return {"name": reward.name, "kind": kind, "options": _plain(options), **reads, "parts": parts}
    identity = identity_of(reward)
    if identity is None:
        why = "has no version" if reward.version is None else "has options that cannot be compared"
        raise ConfigError(
            f"reward '{reward.name}' {why}, so references of it could not be told from those of another. Give it a "
            f'version, @register_reward("{reward.name}", version="1"), and keep what it is told in self.options.'
        )
    name, kind, version, options, dtype = json.loads(identity)[1]
    about: dict[str, Any] = {"name": name, "kind": kind, "version": version, "options": dict(options["map"])}
    return {key: _plain(value) for key, value in {**about, "dtype": dtype}.items()} | reads


def write_tables(path: str | Path, tables: Sequence[Table]) -> Path:
    """Add tables to a file of tables, which all have one base; a reward that is in it already gets the new prompts."""
    path = Path(path)
    found = {str(table.reward["name"]): table for table in (read_tables(path) if path.exists() else [])}
    for table in tables:
        known = found.get(str(table.reward["name"]))
        for other in found.values():
            if differs := _difference(other.base, table.base, "base"):
                raise ConfigError(
                    f"'{path}' holds references of another base: {differs}. One file has one base, so that its "
                    "rewards stay comparable. Give --calibrate another file."
                )
        found[str(table.reward["name"])] = known.merge(table) if known else table
    content = [{**table._content(), "hash": table.hash} for table in found.values()]
    return atomic.write_text(path, json.dumps({"schema": SCHEMA, "tables": content}, allow_nan=False) + "\n")


def read_tables(path: str | Path) -> list[Table]:
    """The tables of a file, each held against its hash."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no table of references '{path}'. Make it: {_command(path)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        if schema == SCHEMA:
            return [_table(row) for row in content["tables"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(
            f"'{path}' is not a table of references as it was written: it was edited or damaged "
            f"({type(e).__name__}: {str(e)[:80]}), so nothing in it can be trusted. Make it again: {_command(path)}"
        ) from e
    raise ConfigError(
        f"'{path}' has schema {schema!r}, and this version of diffalign reads {SCHEMA}. Make it again: {_command(path)}"
    )


def table_of(reward: Reward, tables: Sequence[Table], path: str | Path) -> Table:
    """The table of exactly this reward, under whatever name; else an error that says what differs and what to run."""
    wanted = describe(reward)
    near = sorted(tables, key=lambda table: table.reward["name"] != reward.name)
    for table in near:
        if not _difference(table.reward, {**wanted, "name": table.reward["name"]}):
            return table
    again = f"Make it from images of the base model: {_command(path, reward.name)}"
    if near and near[0].reward["name"] == reward.name:
        raise ConfigError(
            f"'{path}' was measured with another '{reward.name}' than the one in use: "
            f"{_difference(near[0].reward, wanted, 'reward')}. {again}, into another file."
        )
    names = ", ".join(str(table.reward["name"]) for table in tables) or "none"
    raise ConfigError(f"'{path}' has no references of reward '{reward.name}' (it has: {names}). {again}")


def _table(row: Mapping[str, Any]) -> Table:
    if row["hash"] != _hash({key: value for key, value in row.items() if key != "hash"}):
        raise ValueError(f"the hash of '{row['reward']['name']}' does not fit")
    prompts = {prompt: tuple(values) for prompt, values in row["prompts"].items()}
    return Table(reward=row["reward"], base=row["base"], prompts=prompts, invalid=row["invalid"])


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _command(path: str | Path, reward: str = "REWARD") -> str:
    return f"diffalign score RUN --reward {reward} --calibrate {path}"


def _plain(value: Any) -> Any:
    """The same as JSON has it; what JSON cannot hold becomes text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value) if isinstance(value, float | Path) else type(value).__name__


def _difference(old: Any, new: Any, where: str = "") -> str:
    """The first field in which two descriptions differ, with both values; empty where they agree."""
    return next(_differences(old, new, where), "")


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}".strip("."))
    elif old != new:
        yield f"{where} is {_short(old)} there and {_short(new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
