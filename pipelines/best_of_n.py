"""Best-of-N for any stock pipeline: draw N candidates per prompt from their own seeds, return the best.

Paper: "Asymptotics of Language Model Alignment", Yang et al., 2024 (arXiv 2404.01730), for what the selection does to
the distribution; the formulas live in `diffalign/search/best_of_n.py`.

Where we differ: nowhere. Candidate 0 is the stock image for the caller's generator; later candidates draw from seeds of
their own, derived from the case's seed (`cases.candidate_seed`). A reward that compares a prompt's pictures with each
other is asked once, about all its candidates, after the last draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign import media, scoring
from diffalign.budget import Budget, Limits, limits_of
from diffalign.cases import Case
from diffalign.errors import BudgetError, ConfigError
from diffalign.registry import register_pipeline
from diffalign.report import BestOfNReport
from diffalign.request import Request
from diffalign.scoring import Score
from diffalign.search.best_of_n import best_first, running_best
from diffalign.shell import Shell

DEFAULT_N = 8


class Search:
    """One best-of-N call in progress: candidates so far, what they cost, and the rows worth keeping."""

    def __init__(self, pipe: Shell, request: Request, reward: scoring.Reward) -> None:
        self.pipe, self.request, self.reward = pipe, request, reward
        request.require_prompts(reward)
        self.prompts = len(request.cases)
        self.n: int | None = None
        self.top_k: int | None = None
        self.budget = Budget(prompts=self.prompts)
        self.score_options: dict[str, Any] = {}
        self.together = scoring.is_listwise(reward)  # whether a prompt's candidates are scored beside each other
        self.drawn: list[Tensor] = []  # pixels of each stock call, kept only for that
        self.place = torch.device("cpu")  # where they came from
        self.scores: list[Score] = []  # one per stock call, rows in the order of its output; together, one per prompt
        self.marks: list[tuple[float, float]] = []  # NFE and seconds per prompt after each stock call
        self.kept: dict[tuple[int, int], dict[Any, Any]] = {}  # (prompt, candidate) -> its row of every output field
        self.output: Any = None

    def limit(self, n: int | None, budget: Limits | int | float | str | None, top_k: int | None) -> None:
        """Say how far to go: `n` candidates, a budget per prompt, or whichever ends first."""
        self.budget = Budget(limits_of(budget), prompts=self.prompts)
        unlimited = self.budget.limits == Limits()
        self.n, self.top_k = (DEFAULT_N if n is None and unlimited else n), top_k
        for name, value in (("n", self.n), ("top_k", top_k)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but best-of-n needs at least 1.")
        if self.n is not None and top_k is not None and top_k > self.n:
            raise ConfigError(f"top_k is {top_k}, but there are only {self.n} candidates. Raise n or lower top_k.")

    def run(self) -> Any:
        """Draw until n or the budget is reached; give back an output of the stock type with the best rows."""
        with self.pipe.one_bar(self.n) as bar:
            cost = self._draw(0)
            self._require(cost)
            bar.update(self.request.per_call)
            while self._wants_more() and self.budget.allows(**cost):
                cost["seconds"] = max(cost["seconds"], self._draw(len(self.marks))["seconds"])
                bar.update(self.request.per_call)
        if self.together:
            self._compare()
        return self._assemble()

    def _draw(self, number: int) -> dict[str, Any]:
        """One stock call, scored unless that comes last; returns what it cost."""
        before, start = (self.budget.nfe, self.budget.decodes, self.budget.reward_calls), self.budget.seconds
        self.output, pixels = self.pipe.render(self.request.asked(number), self.budget)
        if number == 0:
            self.request.settle(len(pixels))
            self._check_calls()
        cases = self.request.asked_cases(number)
        if self.together:
            self.drawn.append(pixels.cpu())
            self.place = pixels.device
        else:
            self._score(pixels, cases)
        self.budget.charge(reward_calls=len(cases) * len(scoring.leaves(self.reward)))
        self._keep(number, pixels)
        now = self.budget.spent()
        self.marks.append((now["nfe"], now["seconds"]))
        nfe, decodes, calls = before
        spent = {"nfe": self.budget.nfe - nfe, "decodes": self.budget.decodes - decodes}
        return spent | {"reward_calls": self.budget.reward_calls - calls, "seconds": self.budget.seconds - start}

    def _score(self, pixels: Tensor, cases: Sequence[Case]) -> None:
        found = scoring.score(self.reward, pixels, cases, all_invalid=True, **self.score_options)
        self.scores.append(Score(found.total.cpu(), {k: v.cpu() for k, v in found.parts.items()}, found.valid.cpu()))

    def _compare(self) -> None:
        """Score all candidates of each prompt in one go."""
        each = self.request.per_call
        cases = [self.request.asked_cases(number) for number in range(len(self.drawn))]
        for prompt in range(self.prompts):
            own = slice(prompt * each, (prompt + 1) * each)
            pixels = torch.cat([call[own] for call in self.drawn]).to(self.place)
            self._score(pixels, [case for call in cases for case in call[own]])
        self.drawn.clear()

    def _require(self, cost: dict[str, Any]) -> None:
        self.budget.require(**{k: v for k, v in cost.items() if k != "seconds"})
        seconds = self.budget.limits.seconds
        if seconds is not None and cost["seconds"] > seconds * self.prompts:
            each = cost["seconds"] / self.prompts
            raise BudgetError(
                f"the budget allows {seconds:g} seconds per prompt, but one candidate took {each:.3g}. "
                f"Raise the budget, or lower num_inference_steps."
            )

    def _check_calls(self) -> None:
        each = self.request.per_call
        if self.n is not None and self.n % each:
            raise ConfigError(
                f"n is {self.n}, but each call makes {each} images per prompt. Make n a multiple of {each}."
            )
        self.top_k = each if self.top_k is None else self.top_k

    def _wants_more(self) -> bool:
        if getattr(self.pipe, "_interrupt", False):  # a callback stopped the last call
            return False
        return self.n is None or len(self.marks) * self.request.per_call < self.n

    def _keep(self, number: int, pixels: Tensor) -> None:
        """Remember this call's rows, then forget every row that can no longer be among the best."""
        each = self.request.per_call
        fields, _ = media.open_output(self.output)
        rows = {name: media.rows_of(value, len(pixels)) for name, value in fields.items()}
        for prompt in range(self.prompts):
            for j in range(each):
                at = prompt * each + j
                self.kept[prompt, number * each + j] = {k: v[at] for k, v in rows.items() if v is not None}
        if self.together:  # any may still be the best
            return
        best = {(p, int(k)) for p, row in enumerate(self._best()) for k in row}
        self.kept = {key: row for key, row in self.kept.items() if key in best}

    def _table(self) -> Score:
        """All scores so far as (P, N): prompts by candidates."""
        found, each = Score.concat(self.scores), self.request.per_call

        def table(values: Tensor) -> Tensor:
            if self.together:
                return values.view(self.prompts, -1)
            calls = values.view(len(self.scores), self.prompts, each)
            return calls.transpose(0, 1).reshape(self.prompts, -1)

        return Score(table(found.total), {k: table(v) for k, v in found.parts.items()}, table(found.valid))

    def _best(self) -> Tensor:
        found = self._table()
        return best_first(found.total, found.valid, self.top_k or 1)

    def _curve(self) -> list[tuple[float, float, float]]:
        """What every stock call had cost, and the mean of the best rewards up to it."""
        found, each = self._table(), self.request.per_call
        best = running_best(found.total, found.valid)[:, each - 1 :: each]
        reached = [column[column.isfinite()] for column in best.unbind(1)]
        means = [float(column.mean()) if len(column) else float("nan") for column in reached]
        return [(*mark, mean) for mark, mean in zip(self.marks, means, strict=True)]

    def _assemble(self) -> Any:
        found = self._table()
        for case, valid in zip(self.request.cases, found.valid, strict=True):
            if not valid.any():
                raise scoring.none_valid(self.reward, case, len(valid))
        if self.top_k is not None and self.top_k > found.total.shape[1]:
            raise BudgetError(
                f"top_k is {self.top_k}, but the budget ended after {found.total.shape[1]} candidates. "
                "Raise the budget or lower top_k."
            )
        winners = [self.kept[p, int(k)] for p, row in enumerate(self._best()) for k in row]
        fields, key = media.open_output(self.output)
        joined = {name: media.join_rows([row[name] for row in winners]) for name in winners[0]}
        joined[key] = self.pipe.as_asked(joined[key], self.request.arguments)
        return media.close_output(self.output, fields | joined)

    def report(self) -> BestOfNReport:
        found = self._table()
        n = found.total.shape[1]
        return BestOfNReport(
            method="best_of_n",
            reward=self.reward.name,
            scores=found,
            best=self._best(),
            seeds=[[self.request.told_seed(p, k) for k in range(n)] for p in range(self.prompts)],
            budget=self.budget.spent(),
            curve=self._curve(),
            card=self.request.card(self.pipe) | {"reward_version": self.reward.version, "n": n},
        )


@register_pipeline("best_of_n")
class BestOfNPipeline(Shell):
    """Calls the stock pipeline several times and keeps the images a reward likes best."""

    def __call__(
        self,
        *args: Any,
        reward: Any = None,
        n: int | None = None,
        budget: Limits | int | float | str | None = None,
        top_k: int | None = None,
        reward_chunk: int | None = None,
        score_cache: scoring.ScoreCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; with `reward` the best `top_k` of `n` candidates per prompt, best first, and a `.report`.

        `budget` limits what a prompt may cost: an int is NFE, "20s" or a float is seconds. Without `n` and `budget`
        there are 8 candidates. `top_k` defaults to as many images as the stock call gives. `latents` and the caller's
        generator belong to candidate 0. `report` is also kept on the pipeline, for `return_dict=False`.
        """
        if reward is None:
            return self.call_stock(*args, **kwargs)
        request = Request.of(self, self.stock_class.__call__, args, kwargs)
        search = Search(self, request, scoring.make_reward(reward))
        search.limit(n, budget, top_k)
        search.score_options = {"chunk": reward_chunk, "cache": score_cache}
        with torch.no_grad():
            output = search.run()
        self.report = search.report()
        if not isinstance(output, tuple):
            output.report = self.report
        return output
