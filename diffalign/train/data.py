"""Prompts to train on, and which of them a step uses: a function of the seed and the step's number, nothing else."""

from __future__ import annotations

import functools
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from diffalign.cases import Case, derived_seed
from diffalign.data.preferences import plain
from diffalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where training prompts come from."""

    file: str | None = None  # any prompt file that `diffalign generate` reads
    split: Literal["train", "heldout", "hard"] | None = None  # or a prompt set of the shapes world
    limit: int | None = None  # only the first so many distinct prompts
    keep_duplicates: bool = False  # a prompt that is listed three times comes three times as often

    def __post_init__(self) -> None:
        if (self.file is None) == (self.split is None):
            given = "no prompts" if self.file is None else "both prompts and split"
            raise ConfigError(f"the job has {given}. Give prompts, a file, or split, a prompt set of the shapes world.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}, but training needs at least 1 prompt.")


def read(config: PromptsConfig) -> list[Case]:
    """The cases to train on, each prompt once unless duplicates are kept; ConfigError where there is none."""
    if config.split is not None:
        from diffalign import world

        cases = world.prompts(config.split)
    else:
        from diffalign.data.named_pictures import INPUTS, with_named
        from diffalign.data.prompt_sets import read_prompts

        cases = with_named(read_prompts(str(config.file)), Path(str(config.file)), tuple(INPUTS))
    where = config.file or config.split
    cases = [case for case in cases if case.prompt.strip()]
    if not config.keep_duplicates:
        cases = merged(cases, where=str(where))
    if not cases:
        raise ConfigError(f"'{where}' holds no prompt to train on. Put one prompt on each line.")
    return cases[: config.limit]


def merged(cases: Sequence[Case], *, where: str = "the prompts") -> list[Case]:
    """Each prompt once, the first of its kind; cases with a picture of their own all stay."""
    found: dict[object, Case] = {}
    for number, case in enumerate(cases):
        pictures = any(picture is not None for picture in (case.source, case.control, case.reference))
        found.setdefault(number if pictures else " ".join(case.prompt.split()), case)
    if len(found) < len(cases):
        warnings.warn(
            f"'{where}' lists {len(cases) - len(found)} of {len(cases)} prompts again; {len(found)} distinct ones are "
            "used, each equally often.",
            stacklevel=3,
        )
    return list(found.values())


def weights_of(cases: Sequence[Case], weights: Mapping[str, float], by: str) -> list[float] | None:
    """The weight of each case by its value of `by` in the metadata, 1 where none is given; None where all are alike."""
    if not weights:
        return None
    values = Counter(str(case.metadata.get(by)) for case in cases)
    for name in weights:
        if name not in values:
            near = get_close_matches(name, list(values), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"prompt_weights names '{name}', but no prompt has it as {by}.{hint} "
                f"Known: {', '.join(sorted(values))}."
            )
    found = [float(weights.get(str(case.metadata.get(by)), 1.0)) for case in cases]
    if not any(found):
        raise ConfigError("prompt_weights gives every prompt the weight 0. Leave one of them above 0.")
    return found


class PromptSampler:
    """Which prompts a step uses. Nothing is remembered between steps, so a resumed run needs no position.

    Without weights an epoch goes through all prompts in a fresh order before any comes again. With weights each step
    draws for itself. No prompt comes twice in a step as long as there are enough of them.
    """

    def __init__(self, cases: Sequence[Case], seed: int, weights: Sequence[float] | None = None) -> None:
        if not cases:
            raise ConfigError("there is no prompt to train on. Give a file with one prompt a line.")
        if weights is not None and (len(weights) != len(cases) or min(weights) < 0 or not any(weights)):
            raise ConfigError(
                f"{len(weights)} weights for {len(cases)} prompts: one each, none below 0, not all of them 0."
            )
        self.cases = list(cases)
        self.seed = seed
        self.weights = None if weights is None else list(weights)
        self._chained = functools.lru_cache(maxsize=4)(self._chain)

    def at(self, step: int, groups: int) -> list[int]:
        """The numbers of the prompts of this step; with another count of groups the whole walk is another."""
        if self.weights is not None:
            return self._weighted(step, groups, self.weights)
        first, size = step * groups, len(self.cases)
        epochs = range(first // size, (first + groups - 1) // size + 1)
        joined = [index for epoch in epochs for index in self._order(epoch, groups)]
        return joined[first - epochs[0] * size :][:groups]

    def cases_of(self, step: int, groups: int, group_size: int) -> list[Case]:
        """The cases of this step, prompt by prompt, each with a seed of its own."""
        return [
            self.cases[index].with_seed(derived_seed(self.seed, "train", step, group, member))
            for group, index in enumerate(self.at(step, groups))
            for member in range(group_size)
        ]

    def tasks_of(self, step: int, groups: int, by: str) -> list[int]:
        """The number of each group's task in this step: prompts with one value of `by` in their metadata share it."""
        values = [str(self.cases[index].metadata.get(by)) for index in self.at(step, groups)]
        numbers = {value: k for k, value in enumerate(dict.fromkeys(values))}
        return [numbers[value] for value in values]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.cases)))
        random.Random(derived_seed(self.seed, "prompts", epoch)).shuffle(order)
        return order

    def _order(self, epoch: int, groups: int) -> list[int]:
        """The prompts of an epoch; the step that runs over from the one before finds other prompts at its start."""
        size = len(self.cases)
        over = epoch * size % groups  # prompts of that step which the epoch before has given
        if epoch == 0 or size < groups or not over:
            return self._shuffled(epoch)
        if size >= 2 * groups:  # the end of an epoch is as it was shuffled
            return _avoiding(self._shuffled(epoch), self._shuffled(epoch - 1)[-over:], groups - over)
        return list(self._chained(epoch, groups))

    def _chain(self, epoch: int, groups: int) -> list[int]:
        """The same where an epoch is so short that its end depends on how it began: walk from an epoch that is free."""
        size = len(self.cases)
        start = next(e for e in range(epoch, -1, -1) if e == 0 or e * size % groups == 0)
        order = self._shuffled(start)
        for e in range(start + 1, epoch + 1):
            over = e * size % groups
            order = _avoiding(self._shuffled(e), order[-over:], groups - over)
        return order

    def _weighted(self, step: int, groups: int, weights: Sequence[float]) -> list[int]:
        """Draws without replacement in proportion to the weights: the smallest of exponential times."""
        rng = random.Random(derived_seed(self.seed, "prompts", "weighted", step))
        times = [rng.expovariate(1.0) / weight if weight else float("inf") for weight in weights]
        ranked = sorted((time, index) for index, time in enumerate(times) if time < float("inf"))
        return [ranked[k % len(ranked)][1] for k in range(groups)]


def shared_prompts(training: Sequence[Case], evaluation: Sequence[Case]) -> list[str]:
    """Training prompts that are evaluation prompts too, but for case, spaces and a full stop."""
    known = {plain(case.prompt) for case in evaluation}
    return list(dict.fromkeys(case.prompt for case in training if plain(case.prompt) in known))


def _avoiding(order: Sequence[int], used: Sequence[int], count: int) -> list[int]:
    """`order` with its first `count` places given to prompts that are not `used`; the rest keeps its order."""
    taken = set(used)
    head = [index for index in order if index not in taken][:count]
    chosen = set(head)
    return head + [index for index in order if index not in chosen]
