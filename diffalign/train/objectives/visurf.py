"""ViSurf on images: a reference picture stands in every group, as one more draw with a reward of its own.

Paper: "ViSurf: Visual Supervised-and-Reinforcement Fine-Tuning for Large Vision-and-Language Models", 2025 (arXiv
2510.10606), whose labels of questions become pictures of prompts. Where the model cannot solve a prompt, its reference
is the best of the group and is learnt; where it can, the reference says nothing any more.

Where we differ: the paper is about words and ratios. Here the group is learnt as `nft` learns it, where a picture needs
no likelihood. The three controls of a reference's reward: it goes through the model's own autoencoder before it is
scored (align); rewards that it gets for free, named in `free`, count 0 (eliminate); where a draw is as good, its reward
becomes the mean of the draws (smooth).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign import media
from diffalign.cases import Case
from diffalign.data.pictures import Picture
from diffalign.errors import ConfigError
from diffalign.train.advantage import Advantages
from diffalign.train.groups import Grouped, Made
from diffalign.train.job import Job
from diffalign.train.known import Stock, latents
from diffalign.train.objectives.nft import NFT, NFTConfig
from diffalign.train.renoised import Clean


@dataclass(frozen=True, kw_only=True)
class ViSurfConfig(NFTConfig):
    """How the reference's reward is held in check."""

    smooth: bool = True  # a reference that some draw equals gets the mean of the draws, and so teaches nothing
    free: tuple[str, ...] = ()  # rewards that a reference gets for nothing; they count 0 for it


def controlled(members: Tensor, total: Tensor, size: int, free: Tensor, *, smooth: bool) -> Tensor:
    """Rewards (n, K) of groups of `size`, each with its reference last, with the reference's own put right.

    total (n,) is what the members come to and free (K,) says which of them a reference gets for nothing; `total` must
    have been taken after that.
    """
    found = members.clone().view(-1, size, members.shape[1])
    sums = total.view(-1, size)
    for group, (rows, worth) in enumerate(zip(found, sums, strict=True)):
        found[group, -1] = torch.where(free, 0.0, rows[-1])
        drawn = worth[:-1][~worth[:-1].isnan()]
        if smooth and len(drawn) and not float(drawn.max()) < float(worth[-1]):
            found[group, -1] = rows[:-1].nanmean(0)
    return found.view_as(members)


class WithReferences(Grouped):
    """Base of objectives whose groups hold a reference, as the last of their pictures; `config` has smooth and free."""

    takes_data: ClassVar[bool] = True

    def require_references(self, job: Job) -> None:
        """Refuse a job without references, or with settings that references cannot have."""
        if job.stock is None:
            raise ConfigError(
                f"{self.name} compares draws with a reference picture of each prompt. Give data: {{pairs: [...]}}, or "
                "another source of pictures."
            )
        if job.config.relabel.enabled:
            raise ConfigError(f"relabel turns pairs around, and {self.name} has references. Use it with dpo or sft.")
        names = [reward.name for reward, _ in job.members]
        if strange := sorted(set(self.config.free) - set(names)):
            raise ConfigError(f"free names '{strange[0]}', which is no reward of this job: {', '.join(names)}.")
        if job.config.group_size < 3:
            raise ConfigError(
                f"group_size is {job.config.group_size}, but a group is a reference and two or more draws. Use 3 or "
                "more."
            )

    def references(self, job: Job, step: int, first: int, count: int) -> tuple[list[bool], list[Picture]]:
        """Which of `count` rows of this process from `first` on are references, and their pictures."""
        stock, size = job.stock, job.config.group_size
        assert stock is not None
        prompts = job.sampler.at(step, job.config.groups)  # by their place in the data: two may have one text
        best = [stock.entries[prompts[group]].pictures[0] for group in job.groups_of(job.rank)]
        rows = range(first, first + count)
        return [k % size == size - 1 for k in rows], [best[k // size] for k in rows if k % size == size - 1]

    def judge(
        self, job: Job, step: int, made: Sequence[Made], rewards: Tensor, gains: Tensor | None = None
    ) -> tuple[Advantages, dict[str, float]]:
        free = torch.tensor([reward.name in self.config.free for reward, _ in job.members])
        size = job.config.group_size
        plain = rewards.clone()
        plain[size - 1 :: size] = torch.where(free, 0.0, plain[size - 1 :: size])
        held = controlled(rewards, job.total(plain), size, free, smooth=self.config.smooth)
        found, told = Grouped.judge(self, job, step, made, held, gains)
        leads = found.values.view(len(found.values), -1).mean(1).view(-1, size)[:, -1] > 0
        return found, told | {"reference_leads": float(leads.float().mean())}


class ViSurf(WithReferences, NFT):
    """NFT on groups that hold a reference."""

    name: ClassVar[str] = "visurf"
    settings: ClassVar[type[ViSurfConfig]] = ViSurfConfig
    config: ViSurfConfig

    def check(self, job: Job) -> None:
        self.require_references(job)
        super().check(job)

    def _require_stock(self, job: Job, stock: Stock) -> None:
        self.draws = True
        self.require_groups(job)

    def sampled(self, job: Job, step: int, cases: Sequence[Case]) -> tuple[list[Clean], Tensor]:
        """Draws and references in micro-batches; the last of every group is the reference."""

        def make(first: int, chunk: Sequence[Case]) -> Clean:
            given, pictures = self.references(job, step, first, len(chunk))
            own = [case for case, is_given in zip(chunk, given, strict=True) if not is_given]
            theirs = [case for case, is_given in zip(chunk, given, strict=True) if is_given]
            parts = []
            if own:
                walk = job.driver(own).rollout(quiet=True)
                parts.append((walk.latents[-1].float(), media.to_tensor(walk.media).float()))
            if theirs:
                clean = latents(job, theirs, pictures)
                made = media.to_tensor(job.driver(theirs).decode(clean)).float()
                parts.append((clean, made))
            order = torch.tensor(given).long().argsort(stable=True).argsort()
            joined = [torch.cat(column)[order] for column in zip(*parts, strict=True)]
            return Clean(self.learner(job, chunk), list(chunk), joined[0], joined[1])

        with torch.no_grad(), self.old(job, self.SAMPLES):
            return self.scored(job, cases, make)

    def worth(self, job: Job, rewards: Tensor) -> Tensor:
        return job.total(rewards)


OBJECTIVE = ViSurf
