"""One search call of a drop-in pipeline: its chain, its judge, its budget, and what the user gets back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign import media, scoring
from diffalign.budget import Budget, Limits, limits_of
from diffalign.cases import derived_seed
from diffalign.errors import BudgetError, ConfigError, SeamError
from diffalign.judging import ScoringJudge
from diffalign.report import SearchReport
from diffalign.request import Request
from diffalign.restore import checkpointed, steady
from diffalign.search.forest import Tree
from diffalign.search.judge import Leaf
from diffalign.shell import Shell
from diffalign.walk import PipelineChain

if TYPE_CHECKING:
    from PIL import Image

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

    def where_better(self, other: Found, better: Tensor) -> Found:
        """Noise of `other` for the rows (B,) where that was better, and what it says if any was."""
        if not better.any():
            return self
        if self.noise is None or other.noise is None:
            return other
        return Found(
            torch.stack([b if yes else a for a, b, yes in zip(self.noise, other.noise, better, strict=True)]),
            other.extras,
        )


@dataclass(frozen=True)
class Method:
    """A search to run: `run(session, noise)`, where `noise` is the best start noise of the method before, if any."""

    run: Callable[[Session, Tensor | None], Found]
    starts_from_noise: bool = True  # whether it begins at the noise it is given


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
        if options.rows_at_once is not None and options.rows_at_once < 1:
            raise ConfigError(f"rows_at_once is {options.rows_at_once}, but a model call has at least 1 row.")
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}, but a search gives back at least 1 image per prompt.")
        self.budget = Budget(limits_of(options.budget), prompts=prompts)
        self._call = {k: v for k, v in given.items() if k not in NOT_OURS}
        self._latents = _own_latents(given.get("latents"), prompts, each)
        self.chain = self._chain(self._call)
        self.judge = self._judge(self.chain, max(self.top_k, options.keep))
        self.tree: Tree | None = None  # of a tree search, to be grown on
        self.bar: Any = None
        self.notes: list[str] = []
        self.extras: dict[str, Any] = {}

    def _chain(self, call: dict[str, Any]) -> PipelineChain:
        options = self.options
        return PipelineChain(
            self.pipe,
            self.request.cases,
            call,
            budget=self.budget,
            kernel=options.kernel,
            noise_level=options.noise_level,
            most=options.rows_at_once,
            latents=self._latents,
        )

    def _judge(self, chain: PipelineChain, top_k: int) -> ScoringJudge:
        return ScoringJudge(
            chain,
            self.request.cases,
            self.reward,
            show=self.show,
            asked=self.score_options,
            top_k=top_k,
            on_improve=self._improved,
            at_once=self.options.rows_at_once,
        )

    def run(self, name: str, methods: Sequence[tuple[Method, float]]) -> Any:
        """Each method in turn, with its share of the budget; Ctrl-C gives back the best so far."""
        total = self.budget.limits.nfe
        shown = self.pipe.one_bar(None if total is None else total * self.budget.prompts)
        with closing(self), shown as self.bar:
            self.bar.set_description(name)
            try:
                self._run_all(methods)
            except KeyboardInterrupt:
                if not all(self.judge.best):
                    raise
                self.notes.append("interrupted: this is the best so far")
            self.request.advance()
            output = self._assemble()  # may decode, so offloaded modules go home only after it
        if broken := sum(self.judge.broken):
            self.notes.append(f"{broken} images had NaN or infinite pixels and were dropped")
        if self.judge.constant:
            self.notes.append(f"reward '{self.reward.name}' gave every candidate the same value: search cannot help")
            warnings.warn(f"{self.notes[-1]}. Check that the reward reads these images, or use another.", stacklevel=4)
        self.pipe.report = self.report(name)
        if not isinstance(output, tuple):
            output.report = self.pipe.report
        return output

    def close(self) -> None:
        self.chain.close()

    def _run_all(self, methods: Sequence[tuple[Method, float]]) -> None:
        whole, noise, share = self.budget.limits, None, 0.0
        for k, (method, part) in enumerate(methods):
            share += part
            if k and (noise is None or not method.starts_from_noise):
                self.notes.append(f"method {k + 1} of {len(methods)} draws its own starts, not the noise found before")
            self.budget.limits = whole.part(share) if k + 1 < len(methods) else whole
            try:
                found = method.run(self, noise)
            except (BudgetError, SeamError) as e:
                if not k or not all(self.judge.best):
                    raise
                why = "had too little left" if isinstance(e, BudgetError) else "could not run"
                self.notes.append(f"method {k + 1} of {len(methods)} {why}: {e}")
                continue
            finally:
                self.budget.limits = whole
            noise = found.noise if found.noise is not None else noise
            self.extras |= found.extras

    def while_time_lasts(self, once: Callable[[], Found]) -> Found:
        """A method that runs once, again and again from fresh seeds until the seconds of the budget are over."""
        own, budget, number = list(self.chain.seeds), self.budget, 0
        start, found = budget.totals(), once()
        while budget.limits.seconds is not None:
            cost = {name: total - start[name] for name, total in budget.totals().items()}
            if not budget.allows(**cost):  # the next run may cost what the last one did
                break
            start, before, number = budget.totals(), self.judge.best_reward(), number + 1
            self.chain.seeds = [derived_seed(seed, "round", number) for seed in own]
            try:
                again = once()
            finally:
                self.chain.seeds = own
            found = found.where_better(again, self.judge.best_reward() > before)
        return found

    def another(self, changes: Mapping[str, Any]) -> ScoringJudge:
        """A judge over the same cases and budget whose chain runs the stock call with other arguments."""
        return self._judge(self._chain(self._call | dict(changes)), self.judge.top_k)

    def present(self, judge: ScoringJudge) -> None:
        """Let the leaves of this judge be the result."""
        judge.curve = [*self.judge.curve, *judge.curve]
        self.judge, self.chain = judge, judge.chain  # type: ignore[assignment]

    @contextmanager
    def gradients(self, *, checkpointing: bool = False) -> Iterator[None]:
        """A block in which the model is differentiated."""
        modules = self.chain.driver.modules.values()
        with steady(modules), checkpointed(modules, on=checkpointing):
            yield

    def show(self) -> None:
        """Bring the bar up to date."""
        if self.bar is not None:
            best = self.judge.curve[-1][2]
            self.bar.set_postfix(best=f"{best:.4g}", refresh=False)
            self.bar.update(self.budget.nfe - self.bar.n)

    def report(self, name: str) -> SearchReport:
        scores, counts = self.judge.table()
        best = torch.tensor([[leaf.number for leaf in kept[: self.top_k]] for kept in self.judge.best])
        chain = self.chain
        step = (chain.kernel_name, chain.noise_level) if chain.stepped else (None, None)
        chosen = {"reward_version": self.reward.version, "kernel": step[0], "noise_level": step[1]}
        return SearchReport(
            method=name,
            reward=self.reward.name,
            scores=scores,
            counts=counts,
            best=best,
            seeds=[[-1 if leaf.seed is None else leaf.seed for leaf in row] for row in self.judge.leaves],
            budget=self.budget.spent(),
            curve=self.judge.curve,
            card=self.request.card(self.pipe) | chosen,
            extras=self.extras,
            notes=self.notes,
            kept=self.judge.best,
            tree=self.tree,
        )

    def _assemble(self) -> Any:
        judge = self.judge
        for case, kept, row, broken in zip(self.request.cases, judge.best, judge.leaves, judge.broken, strict=True):
            if not kept and broken:
                images = f"{len(row)} images of '{case.prompt[:80]}', and none could be scored"
                raise media.not_finite(type(self.pipe).__name__, broken, images)
            if not kept:
                raise scoring.none_valid(self.reward, case, len(row))
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


def _own_latents(latents: Tensor | None, prompts: int, each: int) -> Tensor | None:
    """The start noise of each prompt's first image."""
    if latents is not None and len(latents) != prompts * each:
        raise ConfigError(f"latents has {len(latents)} rows, but the call makes {prompts * each} images.")
    return None if latents is None else latents[::each]
