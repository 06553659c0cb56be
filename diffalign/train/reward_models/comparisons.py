"""Comparisons to learn from and to be judged by: read, split by prompt, and dealt to steps as batches of pairs."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign import vision
from diffalign.cases import derived_seed
from diffalign.data.accuracy import Judged
from diffalign.data.preferences import overlap, prompt_key
from diffalign.errors import ConfigError
from diffalign.train import known
from diffalign.train.data import PromptSampler
from diffalign.train.known import DataConfig, Known
from diffalign.train.reward_models.settings import RewardConfig

TIES = ("ties", "pick")  # losses that pictures as good as each other teach something
FEW = 20  # held-out prompts below which an interval says little


class Pair(NamedTuple):
    """Two pictures by their places; the label is the chance that the first is better."""

    first: int
    second: int
    label: float


@dataclass(frozen=True)
class Split:
    """What teaches and what judges; no prompt is in both."""

    train: list[Known]
    heldout: list[Known]


@dataclass
class Batch:
    """Pictures of some entries, and the pairs among them."""

    images: list[Tensor]  # (3, H, W) in [0, 1], of any size
    prompts: list[str]  # of each picture
    pairs: list[Pair]
    weights: list[float]  # of each pair
    sizes: list[int]  # pictures of each entry
    best: list[list[int]]  # the best of each entry, by their places
    entry_weights: list[float]
    counts: list[int]  # pairs of each entry

    def __len__(self) -> int:
        return len(self.images)

    def places(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First, second and label (P,) of all pairs, beside ratings `like`."""
        first = torch.tensor([pair.first for pair in self.pairs], dtype=torch.long, device=like.device)
        second = torch.tensor([pair.second for pair in self.pairs], dtype=torch.long, device=like.device)
        return first, second, torch.tensor([pair.label for pair in self.pairs]).to(like)


def read(config: RewardConfig) -> Split:
    """The data of a job in two parts, each of which is told something by."""
    found = _usable(known.read(config.data, ties=config.loss.kind in TIES), config)
    asked = config.evaluate
    if asked.pairs or asked.from_search:
        other = DataConfig(pairs=asked.pairs, from_search=asked.from_search, images=asked.images)
        split = Split(found, _usable(known.read(other, ties=True), config))
        _require_apart(split)
    else:
        learnt = [each for each in found if _place(each) >= asked.share]
        split = Split(learnt, _unseen([each for each in found if _place(each) < asked.share], learnt))
    split = Split(split.train, spread(split.heldout, asked.limit))
    for part, what in ((split.train, "to learn from"), (split.heldout, "held out")):
        if not any(pairs_of(each.scores, config.tie_below) for each in part):
            raise ConfigError(
                f"of {len(found)} entries none is left {what} with one picture better than another. Give more data, or "
                "another evaluate.share."
            )
    if (count := len({prompt_key(each.case.prompt) for each in split.heldout})) < FEW:
        warnings.warn(f"only {count} prompts are held out: their accuracy will be rough.", stacklevel=2)
    return split


def _usable(entries: list[Known], config: RewardConfig) -> list[Known]:
    """Those that enough voters agree on; edits are refused."""
    if edited := next((each for each in entries if each.case.source is not None), None):
        raise ConfigError(
            f"the data compares edits of a picture ('{edited.case.prompt[:60]}'), but a reward trained here sees a "
            "picture and its prompt alone. Use comparisons of generated pictures."
        )
    if config.min_confidence is None:
        return entries
    sure = [each for each in entries if each.confidence is None or each.confidence >= config.min_confidence]
    if not sure:
        raise ConfigError(f"no entry has the confidence of {config.min_confidence}. Lower min_confidence.")
    return sure


def _place(entry: Known) -> float:
    """Where a prompt lies in [0, 1), by what it says and nothing else."""
    return int(prompt_key(entry.case.prompt)[:8], 16) / 16**8


def _require_apart(split: Split) -> None:
    """Refuse a held-out set that shares prompts or pictures with what teaches."""
    shared = overlap([each.case.prompt for each in split.train], [each.case.prompt for each in split.heldout])
    if shared:
        raise ConfigError(
            f"{len(shared)} held-out prompts are trained on too, such as '{shared[0][:60]}', so the accuracy would be "
            "of what was learnt by heart. Take them out of one of the two."
        )
    both = len(split.heldout) - len(_without_pictures_of(split.train, split.heldout))
    if both:
        raise ConfigError(
            f"{both} held-out entries show pictures that are trained on too, under other prompts. Take them out of one "
            "of the two."
        )


def _without_pictures_of(train: Sequence[Known], heldout: Sequence[Known]) -> list[Known]:
    seen = {known.content(picture) for each in train for picture in each.pictures}
    return [each for each in heldout if not any(known.content(picture) in seen for picture in each.pictures)]


def _unseen(heldout: list[Known], train: Sequence[Known]) -> list[Known]:
    """Those that judge by pictures of their own."""
    found = _without_pictures_of(train, heldout)
    if len(found) < len(heldout):
        warnings.warn(
            f"{len(heldout) - len(found)} of {len(heldout)} held-out entries show pictures that are trained on under "
            "other prompts; they are left out.",
            stacklevel=3,
        )
    return found


def spread(entries: Sequence[Known], limit: int | None) -> list[Known]:
    """At most so many entries, from everywhere in the list."""
    count = len(entries) if limit is None else min(limit, len(entries))
    return [entries[k * len(entries) // count] for k in range(count)]


def pairs_of(scores: Sequence[float], tie_below: float = 0.0, *, ties: bool = False) -> list[Pair]:
    """Every two pictures whose worth differs by `tie_below` at least; with `ties` the others too, labelled 1/2."""
    found = []
    for i, j in combinations(range(len(scores)), 2):
        gap = scores[i] - scores[j]
        tied = gap == 0 or abs(gap) < tie_below
        if ties or not tied:
            found.append(Pair(i, j, 0.5 if tied else float(gap > 0)))
    return found


def count_pairs(entries: Iterable[Known], config: RewardConfig) -> int:
    return sum(len(pairs_of(each.scores, config.tie_below, ties=config.loss.kind in TIES)) for each in entries)


def digest(entries: Iterable[Known]) -> str:
    """One name for all entries in their order."""
    told = hashlib.sha256()
    for each in entries:
        row = [each.case.prompt, each.scores, each.confidence, [known.content(picture) for picture in each.pictures]]
        told.update(repr(row).encode("utf-8", "surrogatepass"))
    return told.hexdigest()[:16]


def ranks(entry: Known, tie_below: float) -> list[int]:
    """1 is best; each picture's rank is one more than the number of those that are better."""
    return [1 + sum(b - a >= tie_below and b > a for b in entry.scores) for a in entry.scores]


def judged(entry: Known, found: Sequence[float], tie_below: float) -> Judged:
    """An entry with what a reward says of it."""
    return Judged(ranks=ranks(entry, tie_below), scores=list(found), group=prompt_key(entry.case.prompt))


class Dealer:
    """Which entries a step learns from, by seed and step alone."""

    def __init__(self, entries: Sequence[Known], config: RewardConfig, seed: int) -> None:
        self.entries, self.config, self.seed = list(entries), config, seed
        self._sampler = PromptSampler([each.case for each in entries], seed)
        self._worth: defaultdict[str, float] = defaultdict(
            float
        )  # what a prompt's entries come to in a step each, on average
        for each in entries:
            self._worth[prompt_key(each.case.prompt)] += self._dealt(each)

    def of(self, step: int) -> list[tuple[Known, list[int]]]:
        """The entries of a step over all processes, with the pictures of each that are looked at."""
        found = []
        for place, index in enumerate(self._sampler.at(step, self.config.batch)):
            entry, most = self.entries[index], self.config.pictures
            chosen = list(range(len(entry.pictures)))
            if len(chosen) > most:
                draws = torch.Generator().manual_seed(derived_seed(self.seed, "pictures", step, place))
                chosen = sorted(torch.randperm(len(chosen), generator=draws)[:most].tolist())
            found.append((entry, chosen))
        return found

    def weigh(self, entry: Known) -> float:
        """What each pair of an entry weighs, or the entry itself where it is one choice."""
        return 1 / max(self._worth[prompt_key(entry.case.prompt)], 1e-9) if self.config.by_prompt else 1.0

    def _dealt(self, entry: Known) -> float:
        """How many pairs, or choices, of an entry a step sees on average."""
        pairs, size, most = count_pairs([entry], self.config), len(entry.pictures), self.config.pictures
        if self.config.loss.kind == "best_of_all":
            return float(pairs > 0)
        return pairs * min(1.0, most * (most - 1) / (size * (size - 1)))

    def batch(self, chosen: Sequence[tuple[Known, list[int]]], *, pixels: bool = True) -> Batch:
        """Entries with their pictures and pairs; without `pixels` only what they weigh."""
        made = Batch([], [], [], [], [], [], [], [])
        listwise, ties = self.config.loss.kind == "best_of_all", self.config.loss.kind in TIES
        for entry, places in chosen:
            start, scores = sum(made.sizes), [entry.scores[k] for k in places]
            found = pairs_of(scores, self.config.tie_below, ties=ties)
            soft = self.config.loss.soft and entry.confidence is not None
            for i, j, label in found:
                share = entry.confidence if soft and label == 1 else 1 - (entry.confidence or 0) if soft else label
                made.pairs.append(Pair(start + i, start + j, float(label if label == 0.5 else share or 0.0)))
            made.weights += [self.weigh(entry)] * len(found)
            made.sizes.append(len(places))
            made.counts.append(len(found))
            near = max(scores) - self.config.tie_below  # what is as good as the best
            made.best.append([start + k for k, score in enumerate(scores) if score == max(scores) or score > near])
            made.entry_weights.append(self.weigh(entry) if found and listwise else 0.0)
            if pixels:
                made.images += [vision.to_tensor([entry.pictures[k].open()])[0] for k in places]
                made.prompts += [entry.case.prompt] * len(places)
        return made

    def total(self, chosen: Sequence[tuple[Known, list[int]]]) -> float:
        """What all entries of a step weigh, which every process knows."""
        made = self.batch(chosen, pixels=False)
        return sum(made.entry_weights) if self.config.loss.kind == "best_of_all" else sum(made.weights)
