"""The shipped prompt sets, and how they are drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffalign.cases import Case, read_cases
from diffalign.errors import UnknownName
from diffalign.world.compose import held_out, sample_clauses
from diffalign.world.grammar import TAGS, Clauses, say

FOLDER = Path(__file__).parent / "prompts"
COUNTS = {"train": 2000, "heldout": 240, "hard": 200}
TRAIN_MIX = {"single": 4, "colours": 8, "counting": 18, "two": 6, "binding": 22, "position": 26, "hard": 16}
HARD_MIX = {"a+b+c": 5, "a>b+c": 4, "2a+b": 4, "2a>b": 3, "a+b+c+d": 1, "a>b+c+d": 1, "2a+2b": 1, "2a+b+c": 1}


def prompts(split: str) -> list[Case]:
    """The cases of `train`, `heldout` (compositions that training never sees) or `hard` (three and four objects)."""
    if split not in COUNTS:
        raise UnknownName.among("prompt set", split, COUNTS, "diffalign generate --help")
    return read_cases(FOLDER / f"{split}.jsonl")


def sample_case(kind: str, *, seed: int, unseen: bool | None = None, template: str | None = None) -> Case:
    """One case of a task kind; `unseen` True or False asks for a held-out composition or for none."""
    rng = random.Random(f"{kind} {seed}")
    while True:
        clauses = sample_clauses(kind, rng, template=template)
        if unseen is None or held_out(clauses) == unseen:
            return as_case(clauses, seed)


def as_case(clauses: Clauses, seed: int) -> Case:
    """A case that carries its clauses, so that a verifier need not parse."""
    return Case(prompt=say(clauses), seed=seed, metadata={"tag": clauses.tag, "clauses": clauses.as_dict()})


def draw(split: str, seed: int = 0) -> list[Case]:
    """The cases of a split from a seed; a kind with too few distinct prompts repeats them with other seeds."""
    if split == "heldout":
        wanted = dict.fromkeys(TAGS, COUNTS[split] // len(TAGS))
        return _numbered(_draw_kinds(wanted, random.Random(f"{split} {seed}"), unseen=True))
    if split == "hard":
        wanted = _shares(HARD_MIX, COUNTS[split])
        return _numbered(_draw_kinds(wanted, random.Random(f"{split} {seed}"), unseen=None))
    wanted = _shares(TRAIN_MIX, COUNTS[split])
    return _numbered(_draw_kinds(wanted, random.Random(f"{split} {seed}"), unseen=False))


def write(folder: Path = FOLDER, seed: int = 0) -> None:
    """Write every prompt set as JSONL."""
    for split in COUNTS:
        rows = [{"prompt": c.prompt, "seed": c.seed, "metadata": dict(c.metadata)} for c in draw(split, seed)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def _shares(mix: Mapping[str, int], count: int) -> dict[str, int]:
    total = sum(mix.values())
    shares = {kind: count * weight // total for kind, weight in mix.items()}
    first = next(iter(shares))
    shares[first] += count - sum(shares.values())
    return shares


def _draw_kinds(wanted: Mapping[str, int], rng: random.Random, *, unseen: bool | None) -> Iterator[Clauses]:
    """So many prompts of each kind or hard template, without repeats while fresh ones are found, in turn."""
    pools = {kind: list(_draw_kind(kind, count, rng, unseen=unseen)) for kind, count in wanted.items()}
    order = [kind for kind, pool in pools.items() for _ in pool]
    rng.shuffle(order)
    yield from (pools[kind].pop() for kind in order)


def _draw_kind(kind: str, count: int, rng: random.Random, *, unseen: bool | None) -> Iterator[Clauses]:
    seen: set[Clauses] = set()
    misses = 0
    while count:
        plain = kind in (*TAGS, "hard")
        clauses = sample_clauses(kind if plain else "hard", rng, template=None if plain else kind)
        if unseen is not None and held_out(clauses) != unseen:
            continue
        if clauses in seen and misses < 200:
            misses += 1
            continue
        seen.add(clauses)
        count -= 1
        yield clauses


def _numbered(drawn: Iterator[Clauses]) -> list[Case]:
    return [as_case(clauses, seed) for seed, clauses in enumerate(drawn)]
