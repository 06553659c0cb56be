"""One search call of a drop-in pipeline: its chain, its judge, its budget, and what the user gets back."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from diffalign import config, media, scoring
from diffalign.budget import Budget, Limits
from diffalign.errors import BudgetError, ConfigError, InvalidReward
from diffalign.report import SearchReport
from diffalign.request import Request
from diffalign.restore import checkpointed, frozen
from diffalign.scoring import Score
from diffalign.search.judge import Judge, Leaf
from diffalign.search.nodes import Tree
from diffalign.search.values import CleanPrediction, Completion, Rollouts, Value
from diffalign.shell import Shell
from diffalign.walk import PipelineChain

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
NOT_OURS = ("num_images_per_prompt", "num_videos_per_prompt", "generator", "latents")
STOCK_ONLY = ("callback_on_step_end", "callback")  # a search takes many walks, so there are no steps to show


@dataclass(frozen=True)
class Improvement:
    """What `on_improve` is told: a prompt's best image so far."""

    prompt: int
    reward: float
    candidate: int
    media: Tensor  # (3, H, W) or (F, 3, H, W) in [0, 1]
    nfe: float  # spent per prompt
    seconds: float

    @property
    def image(self) -> Image.Image:
        """The image, or a video's first frame, as PIL."""
        return media.to_pil(self.media if self.media.ndim == 3 else self.media[0])


@dataclass(kw_only=True)
class Options:
    """What every search call takes beside the stock arguments and its method's own config."""

    reward: Any
    budget: Limits | int | float | str | None = None
    top_k: int | None = None
    on_improve: Callable[[Improvement], None] | None = None
    kernel: str = "auto"
    noise_level: float | None = None
    rows_at_once: int | None = None
    reward_chunk: int | None = None
    score_cache: scoring.ScoreCache | None = None
    keep: int = 0  # leaves per prompt whose images the report keeps, where that is more than top_k


@dataclass(frozen=True)
class Found:
    """What a method gives back beside the judge's leaves: start noise of its best and whatever else is worth saying."""

    noise: Tensor | None = None  # (B, ...) standard normal; a next method may start there
    extras: Mapping[str, Any] = field(default_factory=dict)


Method = Callable[["Session", Tensor | None], Found]  # (session, start noise of the method before) -> found


class ScoringJudge(Judge):
    """A judge that keeps every part of a leaf's score."""

    def __init__(self, session: Session, chain: PipelineChain, **options: Any) -> None:
        self.session = session
        self.parts: list[list[dict[str, float]]] = [[] for _ in chain.seeds]
        self._now: Score | None = None
        count = len(getattr(session.reward, "rewards", [session.reward]))
        super().__init__(chain, self._score, rewards=count, **options)

    def record(
        self, x: Tensor, media: Tensor, rows: Sequence[int], rewards: Tensor, seeds: Sequence[int] | None = None
    ) -> Tensor:
        parts = {} if self._now is None else {name: part.detach().tolist() for name, part in self._now.parts.items()}
        for k, row in enumerate(rows):
            self.parts[row].append({name: values[k] for name, values in parts.items()})
        return super().record(x, media, rows, rewards, seeds)

    def mark(self) -> None:
        super().mark()
        self.session.show()

    def _score(self, media: Tensor, rows: Sequence[int]) -> Tensor:
        session = self.session
        cases = [session.request.cases[row] for row in rows]
        self._now = scoring.score(session.reward, media, cases, all_invalid=True, **session.score_options)
        return self._now.total


class Session:
    """One call: prompts in lock-step through one or more methods that share chain, judge and budget."""

    def __init__(self, pipe: Shell, args: Sequence[Any], kwargs: dict[str, Any], options: Options) -> None:
        self.pipe, self.options = pipe, options
        self.request = Request.of(pipe, pipe.stock_class.__call__, args, kwargs)
        self.reward = scoring.make_reward(options.reward)
        self.request.require_prompts(self.reward)
        self.score_options: dict[str, Any] = {"chunk": options.reward_chunk, "cache": options.score_cache}
        given = self.request.arguments
        for name in STOCK_ONLY:
            if given.get(name) is not None:
                raise ConfigError(f"{name} follows one walk, but a search takes many. Use on_improve= to see its best.")
        each = int(given.get("num_images_per_prompt") or given.get("num_videos_per_prompt") or 1)
        prompts = len(self.request.cases)
        self.request.settle(prompts * each)
        self.top_k = options.top_k if options.top_k is not None else each
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}, but a search gives back at least 1 image per prompt.")
        self.budget = Budget(limits_of(options.budget), prompts=prompts)
        self._call = {k: v for k, v in given.items() if k not in NOT_OURS}
        self.chain = PipelineChain(
            pipe,
            self.request.cases,
            self._call,
            budget=self.budget,
            kernel=options.kernel,
            noise_level=options.noise_level,
            most=options.rows_at_once,
            latents=_own_latents(given.get("latents"), prompts, each),
        )
        self.judge = ScoringJudge(self, self.chain, top_k=max(self.top_k, options.keep), on_improve=self._improved)
        self.tree: Tree | None = None  # of a tree search, to be grown on
        self.bar: Any = None
        self.notes: list[str] = []
        self.extras: dict[str, Any] = {}

    def run(self, name: str, methods: Sequence[tuple[Method, float]]) -> Any:
        """Each method in turn, with its share of the budget; Ctrl-C gives back the best so far."""
        total = self.budget.limits.nfe
        with self.pipe.one_bar(None if total is None else total * self.budget.prompts) as self.bar:
            self.bar.set_description(name)
            try:
                self._run_all(methods)
            except KeyboardInterrupt:
                if not all(self.judge.best):
                    raise
                self.notes.append("interrupted: this is the best so far")
            finally:
                self.chain.close()
        if self.judge.constant:
            self.notes.append(f"reward '{self.reward.name}' gave every candidate the same value: search cannot help")
            warnings.warn(f"{self.notes[-1]}. Check that the reward reads these images, or use another.", stacklevel=4)
        output = self._assemble()
        self.pipe.report = self.report(name)
        if not isinstance(output, tuple):
            output.report = self.pipe.report
        return output

    def _run_all(self, methods: Sequence[tuple[Method, float]]) -> None:
        whole, noise, share = self.budget.limits, None, 0.0
        for k, (method, part) in enumerate(methods):
            share += part
            if noise is not None and not getattr(method, "starts_from", True):
                self.notes.append(f"method {k + 1} of {len(methods)} draws its own starts, not the noise found before")
            self.budget.limits = _scaled(whole, share) if k + 1 < len(methods) else whole
            try:
                found = method(self, noise)
            except BudgetError as e:
                if not k or not all(self.judge.best):
                    raise
                self.notes.append(f"method {k + 1} of {len(methods)} had too little left: {e}")
                continue
            finally:
                self.budget.limits = whole
            noise = found.noise if found.noise is not None else noise
            self.extras |= found.extras

    def another(self, changes: Mapping[str, Any]) -> ScoringJudge:
        """A judge over the same cases and budget whose chain runs the stock call with other arguments."""
        chain = PipelineChain(self.pipe, self.request.cases, self._call | dict(changes), budget=self.budget)
        return ScoringJudge(self, chain, top_k=self.judge.top_k, on_improve=self._improved)

    def present(self, judge: ScoringJudge) -> None:
        """Let the leaves of this judge be the result."""
        judge.curve = [*self.judge.curve, *judge.curve]
        self.judge, self.chain = judge, judge.chain  # type: ignore[assignment]

    def checkpointed(self, on: bool) -> AbstractContextManager[None]:
        return checkpointed(self.chain.driver.modules.values(), on=on)

    def show(self) -> None:
        """Bring the bar up to date."""
        if self.bar is not None:
            best = self.judge.curve[-1][2]
            self.bar.set_postfix(best=f"{best:.4g}", refresh=False)
            self.bar.update(self.budget.nfe - self.bar.n)

    def report(self, name: str) -> SearchReport:
        scores, counts = self._scores()
        best = torch.tensor([[leaf.number for leaf in kept[: self.top_k]] for kept in self.judge.best])
        chosen = {"reward_version": self.reward.version, "kernel": self.chain.kernel_name}
        return SearchReport(
            method=name,
            reward=self.reward.name,
            scores=scores,
            counts=counts,
            best=best,
            seeds=[[-1 if leaf.seed is None else leaf.seed for leaf in row] for row in self.judge.leaves],
            budget=self.budget.spent(),
            curve=self.judge.curve,
            card=self.request.card(self.pipe) | chosen | {"noise_level": self.chain.noise_level},
            extras=self.extras,
            notes=self.notes,
            kept=self.judge.best,
            tree=self.tree,
        )

    def _scores(self) -> tuple[Score, list[int]]:
        """Leaves as (P, N), rows filled up with NaN, and how many each prompt has."""
        counts = [len(row) for row in self.judge.leaves]

        def table(rows: list[list[float]]) -> Tensor:
            return torch.tensor([row + [math.nan] * (max(counts) - len(row)) for row in rows])

        names = dict.fromkeys(name for row in self.judge.parts for parts in row for name in parts)
        parts = {n: table([[p.get(n, math.nan) for p in row] for row in self.judge.parts]) for n in names}
        total = table([[leaf.reward for leaf in row] for row in self.judge.leaves])
        return Score(total, parts, ~total.isnan()), counts

    def _assemble(self) -> Any:
        for case, kept, row in zip(self.request.cases, self.judge.best, self.judge.leaves, strict=True):
            if not kept:
                raise InvalidReward(
                    f"reward '{self.reward.name}' is NaN for all {len(row)} candidates of '{case.prompt[:80]}', so "
                    "there is nothing to choose from. Check that the images are sound and the reward can read them."
                )
        fewest = min(map(len, self.judge.best))
        if fewest < self.top_k:
            self.notes.append(f"top_k is {self.top_k}, but a prompt has only {fewest} scored images: these came back")
            warnings.warn(f"{self.notes[-1]}. Raise the budget or lower top_k.", stacklevel=5)
            self.top_k = fewest
        winners: list[Leaf] = [leaf for kept in self.judge.best for leaf in kept[: self.top_k]]
        rows = [leaf.row for leaf in winners]
        x = torch.stack([leaf.x for leaf in winners if leaf.x is not None]).to(self.chain.driver.start())
        output = self.chain.driver.select(rows).output(x)
        fields, key = media.open_output(output)
        given = self.request.arguments
        if given.get("output_type") != "latent":  # then the output holds the latents already
            pixels = torch.stack([leaf.media for leaf in winners if leaf.media is not None])
            fields[key] = self.pipe.as_asked(pixels, given)
        return tuple(fields.values()) if given.get("return_dict") is False else media.close_output(output, fields)

    def _improved(self, leaf: Leaf) -> None:
        if self.options.on_improve is not None and leaf.media is not None:
            spent = self.budget.spent()
            self.options.on_improve(
                Improvement(leaf.row, leaf.reward, leaf.number, leaf.media, spent["nfe"], spent["seconds"])
            )


class SearchShell(Shell):
    """A drop-in pipeline whose call runs search methods; its `__call__` names what the method itself takes."""

    METHOD: ClassVar[str]  # also the keyword of its config
    ADVANCED = ("kernel", "noise_level", "rows_at_once", "reward_chunk", "score_cache", "keep")

    def search(
        self, args: Sequence[Any], kwargs: dict[str, Any], methods: Sequence[tuple[Method, float]], **options: Any
    ) -> Any:
        """The stock arguments and ours, told apart; then the search. The stock call itself where there is no reward."""
        extra = {name: kwargs.pop(name) for name in self.ADVANCED if name in kwargs}
        if options["reward"] is None:
            return self.call_stock(*args, **kwargs)
        session = Session(self, args, kwargs, Options(**options, **extra))
        with torch.no_grad(), frozen(session.chain.driver.modules.values()):
            return session.run(self.METHOD, methods)


def value_of(asked: Any, judge: Judge, strength: float) -> Value:
    """A value of unfinished latents: "clean", a number of completion steps, ("rollouts", n), or an object of ours."""
    if asked is None or asked == "clean":
        return CleanPrediction(judge)
    if isinstance(asked, int):
        return Completion(judge, asked)
    if isinstance(asked, tuple | list) and len(asked) == 2 and asked[0] == "rollouts":
        return Rollouts(judge, int(asked[1]), strength)
    if not callable(asked) or not hasattr(asked, "cost"):
        raise ConfigError(
            f"value is {asked!r}, but it is 'clean', a number of completion steps, ('rollouts', n), or an object with "
            "`cost(i)` and `__call__` as in diffalign.search.values."
        )
    found: Value = asked
    return found


def save_tree(tree: Tree, path: str | os.PathLike[str]) -> None:
    """Write a search tree, to be grown on by a later call."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tree.state().items()}, os.fspath(path))


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """A search tree that `save_tree` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Tree.restore(load_file(os.fspath(path)))
    except (OSError, SafetensorError, KeyError) as e:
        raise ConfigError(f"'{os.fspath(path)}' is not a search tree ({e}). Give a file that save_tree wrote.") from e


def settings(kind: type[T], given: T | Mapping[str, Any] | None, where: str) -> T:
    """A method's config: itself, a mapping of its fields, or the defaults."""
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {type(given).__name__}, but it takes a {kind.__name__} or a mapping.")
    return config.build(kind, given or {}, where=where)


def limits_of(budget: Limits | int | float | str | None) -> Limits:
    """A budget as people say it: an int is NFE per prompt, '20s' or a float is seconds per prompt, Limits are both."""
    if isinstance(budget, Limits) or budget is None:
        return budget or Limits()
    if isinstance(budget, str):
        text = budget.strip().lower()
        try:
            return Limits(seconds=float(text[:-1])) if text.endswith("s") else Limits(nfe=int(text.removesuffix("nfe")))
        except ValueError:
            raise ConfigError(f"budget '{budget}' is neither a number of NFE (400) nor seconds ('20s').") from None
    return Limits(nfe=budget) if isinstance(budget, int) else Limits(seconds=budget)


def _own_latents(latents: Tensor | None, prompts: int, each: int) -> Tensor | None:
    """The start noise of each prompt's first image."""
    if latents is not None and len(latents) != prompts * each:
        raise ConfigError(f"latents has {len(latents)} rows, but the call makes {prompts * each} images.")
    return None if latents is None else latents[::each]


def _scaled(limits: Limits, share: float) -> Limits:
    """The limits up to the end of a stage that may spend `share` of them, stages before included."""
    if share >= 1:
        return limits
    whole = {name: getattr(limits, name) for name in ("nfe", "decodes", "reward_calls")}
    scaled = {name: None if value is None else max(int(value * share), 1) for name, value in whole.items()}
    return replace(limits, **scaled, seconds=None if limits.seconds is None else limits.seconds * share)
