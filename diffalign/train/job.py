"""A fine-tuning job at run time: the pipeline, what is trained in it, its cases and its rewards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffalign import media, scoring
from diffalign.arguments import parameters
from diffalign.cases import Case
from diffalign.clean_latents import Encoder
from diffalign.clip_tower import ClipTower
from diffalign.drive import Driver
from diffalign.errors import ConfigError, DiffalignError
from diffalign.memory import Memory
from diffalign.noise import Levels
from diffalign.scoring import Reward
from diffalign.train.adapters import Trained
from diffalign.train.advantage import combined
from diffalign.train.data import PromptSampler, weights_of
from diffalign.train.known import Stock
from diffalign.train.settings import TrainConfig
from diffalign.train.team import Team

PER_STEP = "train"  # the stream that names the seeds of a step's images


@dataclass(kw_only=True)
class Job(Team):
    """Everything an objective may use."""

    config: TrainConfig
    pipe: Any
    model: str  # as the user named it
    call: dict[str, Any]  # stock arguments while training
    deployed: dict[str, Any]  # stock arguments of an evaluation
    prompts: Sequence[Case]
    monitor: Sequence[Case]  # the cases of every evaluation
    members: Sequence[tuple[Reward, float]]  # rewards with their weights
    trained: Trained
    truth: Reward | None = None
    panel: Sequence[tuple[str, Reward]] = ()
    tower: ClipTower | None = None  # what variety is measured in
    stock: Stock | None = None  # pictures to learn from, where none are drawn
    others: dict[str, Driver] = field(default_factory=dict)  # of other arguments, by what differs

    # cases

    @cached_property
    def sampler(self) -> PromptSampler:
        weights = weights_of(self.prompts, self.config.prompt_weights, self.config.weigh_by)
        return PromptSampler(self.prompts, seed=self.seed, weights=weights)

    def groups_of(self, rank: int) -> list[int]:
        """The groups of a process: its share of what each update learns from, so that updates learn from the same
        groups whatever the number of processes; one run of neighbours where the groups do not divide that way."""
        count, parts = self.config.groups, self.config.updates
        parts = parts if count % (parts * self.processes) == 0 else 1
        whole, share = count // parts, count // parts // self.processes
        return [part * whole + rank * share + k for part in range(parts) for k in range(share)]

    def cases_of(self, step: int) -> list[Case]:
        """The images this process makes in a step, group by group, each with a seed of its own."""
        config, size = self.config, self.config.group_size
        cases = self.sampler.cases_of(step, config.groups, size)
        return [case for group in self.groups_of(self.rank) for case in cases[group * size : (group + 1) * size]]

    @cached_property
    def group_ids(self) -> Tensor:
        """(N,) group of every image of a step, over all processes in their order."""
        groups = [group for rank in range(self.processes) for group in self.groups_of(rank)]
        return torch.tensor(groups).repeat_interleave(self.config.group_size)

    @property
    def own_groups(self) -> Tensor:
        """(n,) group of every image of this process."""
        return self.own(self.group_ids)

    def task_ids(self, step: int) -> Tensor:
        """(N,) task of every image of a step, in the order of `group_ids`; every process knows all of them."""
        tasks = self.sampler.tasks_of(step, self.config.groups, self.config.advantage.task_by)
        return torch.tensor(tasks)[self.group_ids]

    @cached_property
    def memory(self) -> Memory:
        """What the pipeline computed before its loop from equal prompts, shared by all drivers of this job."""
        return Memory()

    def driver(self, cases: Sequence[Case], **changed: Any) -> Driver:
        """The pipeline as a denoiser for these cases, with the arguments of training and `changed` over them."""
        if not changed:
            return self._first.asked(cases, **self.call)
        call, key = self.call | changed, repr(sorted(changed.items()))
        if key not in self.others:
            self.others[key] = self._begun(call)
        return self.others[key].asked(cases, **call)

    @cached_property
    def unguided(self) -> dict[str, Any]:
        """What to change in the call so that guidance runs no second branch; nothing where there is none."""
        rows = self._first.costs[0]
        for name in ("true_cfg_scale", "guidance_scale") if rows > 1 else ():
            if name in parameters(self.pipe) and self._begun(self.call | {name: 1.0}).costs[0] < rows:
                return {name: 1.0}
        return {}

    @cached_property
    def _first(self) -> Driver:
        return self._begun(self.call)

    def _begun(self, call: Mapping[str, Any]) -> Driver:
        """A driver that has found out how this pipeline behaves; all others with its arguments learn from it."""
        driver = Driver(self.pipe, [self.prompts[0]], budget=self.budget, memory=self.memory, **call)
        driver.start()
        return driver

    @cached_property
    def drawn(self) -> torch.Size:
        """The shape of what the pipeline draws of one case: (1, [F,] 3, H, W)."""
        with torch.no_grad():
            return media.to_tensor(self._first.decode(self._first.start())).shape

    @cached_property
    def encoder(self) -> Encoder:
        """The way from pictures to clean latents."""
        return Encoder(self.pipe)

    @property
    def levels(self) -> Levels:
        """The noise levels of the sampler that trains."""
        return self._first.levels

    @property
    def length(self) -> int:
        """Steps of a walk."""
        return self._first.length

    # rewards

    @cached_property
    def weights(self) -> Tensor:
        return torch.tensor([weight for _, weight in self.members])

    @property
    def listwise(self) -> bool:
        """Whether some reward compares the pictures of a prompt, which must then be scored together."""
        return any(scoring.is_listwise(reward) for reward, _ in self.members)

    def total(self, members: Tensor) -> Tensor:
        """One reward (N,) of what the members (N, K) say, as `advantage.missing` has it; NaN where there is none."""
        return combined(members, self.weights.to(members), self.config.advantage)

    def score(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        """What every reward says of media (B, [F,] 3, H, W): (B, K) float32 on the CPU, NaN where it failed."""
        self.budget.charge(reward_calls=len(cases) * len(self.members))
        return torch.stack([rate(reward, media, cases) for reward, _ in self.members], dim=1)

    @torch.no_grad()
    def misses(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        """How far pictures (B, [F,] 3, H, W) are from their prompts (B,): 1 - cosine in [0, 1], a video's by frames."""
        assert self.tower is not None
        frames = media.shape[1] if media.ndim == 5 else 1
        prompts = [case.prompt for case in cases for _ in range(frames)]
        cosines = self.tower.cosines(media.flatten(0, 1) if media.ndim == 5 else media, prompts)
        return (1 - cosines.view(-1, frames).mean(1)).clamp(0, 1).cpu()

    @contextmanager
    def scoring(self) -> Iterator[Callable[[Tensor, Sequence[Case]], Future[Tensor]]]:
        """A block whose scores are computed beside the sampling; nothing of it outlives the block."""
        with ThreadPoolExecutor(1, thread_name_prefix="reward") as pool:

            def ask(media: Tensor, cases: Sequence[Case]) -> Future[Tensor]:
                if self.config.overlap:
                    return pool.submit(self.score, media, cases)
                done: Future[Tensor] = Future()
                done.set_result(self.score(media, cases))
                return done

            yield ask

    def require_valid(self, rewards: Tensor, step: int) -> float:
        """The share of images (N, K) that have no total, as rewards failed on them; too many of them end the run."""
        lost = float(self.total(rewards).isnan().float().mean())
        if lost > self.config.invalid_limit:
            counts = [bool(weight and rewards[:, k].isnan().any()) for k, (_, weight) in enumerate(self.members)]
            names = [reward.name for (reward, _), failed in zip(self.members, counts, strict=True) if failed]
            raise ConfigError(
                f"reward {', '.join(names)} failed on {lost:.0%} of the images of step {step}, more than the "
                f"{self.config.invalid_limit:.0%} of invalid_limit. Training on the rest would follow what the reward "
                "can read. Look at the warnings above, or raise invalid_limit."
            )
        return lost


@torch.no_grad()
def rate(reward: Reward, media: Tensor, cases: Sequence[Case]) -> Tensor:
    """Scores (B,) of one reward on the CPU; where a call fails its rows are asked one by one, and lost alone."""
    try:
        return scoring.score(reward, media, cases, all_invalid=True).total.cpu()
    except ConfigError:
        raise
    except Exception as error:
        if scoring.is_listwise(reward) or len(cases) == 1:
            return _lost(reward, len(cases), error)
        return torch.cat([rate(reward, media[k : k + 1], [case]) for k, case in enumerate(cases)])


def _lost(reward: Reward, rows: int, error: Exception) -> Tensor:
    kind = "" if isinstance(error, DiffalignError) else f"{type(error).__name__}: "
    text = " ".join(str(error).split())[:200]
    warnings.warn(f"reward '{reward.name}' failed on {rows} images ({kind}{text}); they are left out", stacklevel=2)
    return torch.full((rows,), torch.nan)
