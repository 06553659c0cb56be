"""Direct reward back-propagation: the gradient of a differentiable reward runs back through the end of the sampler.

Papers, which differ in where the chain is cut: "Directly Fine-Tuning Diffusion Models on Differentiable Rewards"
(DRaFT, DRaFT-K, DRaFT-LV), 2023 (arXiv 2309.17400) as `rule: last`, with `extra` for its low-variance form; ReFL of
"ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023 (arXiv 2304.05977) as `rule:
jump`; "Aligning Text-to-Image Diffusion Models with Reward Backpropagation" (AlignProp), 2023 (arXiv 2310.03739) as
`rule: random`.

Where we differ: where a chain is cut is drawn once for all images of a step, so that nothing depends on how they are
batched. The sampler is DDIM on the pipeline's own noise levels (Euler for flow models) with a share `eta` of fresh
noise, whatever scheduler the pipeline has. ReFL's denoising loss on other pictures is left out; `anchor` holds the
model near its base instead, where one asks for it. SRPO's and DanceGRPO's variants are not built. A reward that raises
ends the run; one that gives NaN loses that image, and too many of them end the run after the step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign import media, scoring
from diffalign.cases import Case, batched, derived_seed
from diffalign.drive import Driver
from diffalign.errors import ConfigError, NotDifferentiable
from diffalign.noise import case_noise, ddim
from diffalign.restore import checkpointed
from diffalign.train import rehearsal
from diffalign.train.groups import require_no_advantage
from diffalign.train.job import Job
from diffalign.train.objective import Collected
from diffalign.train.rehearsal import Rehearsal
from diffalign.train.renoised import mean_error

FIGURES = ("loss", "reward", "invalid")
OF_RULE = dict.fromkeys(("steps", "extra", "average"), "last") | {"span": "jump"}
OF_RULE |= dict.fromkeys(("centre", "spread", "uniform"), "random")
DRAWS = 100  # of a cut, until it is one; then the centre, or the nearest cut there is


@dataclass(frozen=True, kw_only=True)
class DirectConfig:
    """How much of the chain carries a gradient, and what is made of the reward."""

    rule: Literal["last", "jump", "random"] = "last"  # DRaFT, ReFL, AlignProp
    steps: int | None = 1  # last: how many steps carry a gradient; none is all of them
    span: tuple[float, float] = (0.75, 1.0)  # jump: where in the chain the one step is drawn from
    centre: float = 0.84  # random: the mean place of the cut, as a share of the chain
    spread: float = 0.1  # random: its deviation; 0 cuts at the centre
    uniform: bool = False  # random: anywhere, instead of near the centre
    eta: float = 0.0  # share of fresh noise in a step; AlignProp has 1
    extra: int = 0  # last, with one step: further passes from the finished image made noisy again (DRaFT-LV has 2)
    average: bool = True  # extra passes and the first as a mean; else as a sum
    threshold: float | None = None  # rewards from here on have no gradient: a guard against over-optimisation
    scale: float = 1.0  # of the loss
    anchor: float = 0.0  # weight of the squared distance to the base model's predictions in the steps with a gradient
    checkpoint_decode: bool = False  # a second pass of the decoder instead of its activations

    def __post_init__(self) -> None:
        for wrong in (self._places(), self._numbers()):
            if wrong:
                raise ConfigError(wrong)

    def _places(self) -> str:
        if self.steps is not None and self.steps < 1:
            return f"steps is {self.steps}, but a gradient needs at least the last step. Leave it out for all."
        if not 0 <= self.span[0] < self.span[1] <= 1:
            return f"span is {list(self.span)}, but it goes from one share of the chain to a later one, within 0 and 1."
        if not (0 < self.centre < 1 and self.spread >= 0):
            return f"centre is {self.centre} and spread {self.spread}, but a cut lies inside the chain."
        for each in fields(self):
            rule = OF_RULE.get(each.name, self.rule)
            if rule != self.rule and getattr(self, each.name) != each.default:
                return f"{each.name} is {getattr(self, each.name)}, which goes with rule: {rule} alone. Leave it out."
        if self.extra and self.steps != 1:
            return f"extra is {self.extra}, which goes with steps: 1 alone. Leave it out."
        return ""

    def _numbers(self) -> str:
        if min(self.extra, self.eta, self.anchor) < 0 or not 0 < self.scale < math.inf:
            return (
                f"extra is {self.extra}, eta {self.eta}, anchor {self.anchor} and scale {self.scale}: the first three "
                "are at least 0, and a scale is above 0."
            )
        return ""

    def cut(self, length: int, seed: int) -> int:
        """The first step that carries a gradient."""
        rng = random.Random(seed)
        if self.rule == "last":
            return max(length - (length if self.steps is None else self.steps), 0)
        if self.rule == "jump":
            low, high = (min(math.floor(share * length), length - 1) for share in (self.span[0], self.span[1] - 1e-9))
            return rng.randint(low, high)
        if length == 1:
            return 0
        if self.uniform:
            return rng.randint(1, length - 1)
        for _ in range(DRAWS):
            drawn = int(rng.gauss(self.centre * length, self.spread * length))
            if 1 <= drawn < length:
                return drawn
        return min(max(int(self.centre * length), 1), length - 1)

    def loss(self, reward: Tensor) -> Tensor:
        """What is lowered, of rewards (B,)."""
        if self.threshold is None:
            return -self.scale * reward
        return self.scale * torch.relu(self.threshold - reward)


@dataclass(frozen=True)
class Images:
    """A micro-batch that is yet to be drawn."""

    cases: Sequence[Case]
    cut: int
    step: int

    def __len__(self) -> int:
        return len(self.cases)


class Direct:
    """Climb the reward itself."""

    name: ClassVar[str] = "direct"
    settings: ClassVar[type[DirectConfig]] = DirectConfig

    def __init__(self, config: DirectConfig) -> None:
        self.config = config
        self._seen: list[Tensor] = []  # rewards of the step that is learnt from

    def check(self, job: Job) -> None:
        for reward, _ in job.members:
            if not reward.differentiable or scoring.is_listwise(reward):
                lacks = "has no gradient" if not reward.differentiable else "compares the images of a prompt"
                raise NotDifferentiable(
                    f"direct goes back through the reward, and '{reward.name}' {lacks}. Use crd, nft or flow_grpo with "
                    "it, or a reward such as clip, which has a gradient."
                )
        require_no_advantage(job, "direct climbs the reward itself, which scale and threshold shape.")
        if self.config.rule == "last" and (self.config.steps or 0) > job.length:
            raise ConfigError(
                f"steps is {self.config.steps}, but the sampler has only {job.length}. Leave it out for all of them."
            )

    def prepare(self, job: Job) -> None:
        """Nothing is measured beforehand."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""

    def rehearse(self, job: Job) -> Rehearsal:
        """Try one micro-batch of the first step."""
        found = rehearsal.of_one(job, self, self.collect(job, 0).micros[0])
        self._seen = []
        return found

    def collect(self, job: Job, step: int) -> Collected:
        """The images of a step; they are drawn where they are learnt from."""
        if self._seen:  # every process has scored equally many
            seen, self._seen = torch.cat(self._seen), []
            job.require_valid(job.gather(seen), step - 1)
        cut = self.config.cut(job.length, derived_seed(job.seed, "cut", step))
        return Collected([Images(part, cut, step) for part in batched(job.cases_of(step), job.config.micro_batch)])

    def learn(self, job: Job, micro: Images, share: float) -> dict[str, Tensor]:
        """Draw a micro-batch, with a graph from the cut on, and go back through it."""
        driver, told = job.driver(micro.cases), dict.fromkeys(FIGURES, torch.zeros(()))
        decoders = [module for module in driver.modules.values() if hasattr(module, "decode")]
        with checkpointed(decoders, on=self.config.checkpoint_decode):
            made, clean, penalty = self.drawn(job, driver, micro.cut)
            passes = 1 + self.config.extra
            scale = 1 / passes if self.config.average else 1.0
            self._back(job, micro, made, penalty, scale, share, told)
            for k in range(self.config.extra):
                self._back(job, micro, *self.again(job, driver, clean, k), scale, share, told)
        return told | {name: told[name] / passes for name in ("reward", "invalid")}

    def drawn(self, job: Job, driver: Driver, cut: int) -> tuple[Tensor, Tensor, Tensor]:
        """Media (B, ...) of one walk with its gradient, its clean latents without, and the penalty (B,)."""
        kernel, x = ddim(self.config.eta), None
        with torch.no_grad():
            if cut:
                walk = driver.rollout(kernel, stop=cut, quiet=True, dtype=torch.float32, output_type="latent")
                x = walk.latents[-1]
        if self.config.rule == "jump":
            x = driver.start() if x is None else x
            prediction = driver.predict(x, cut, grad=True)
            clean = driver.levels.denoised(x, prediction, cut)
            return (
                _pixels(driver.decode(clean, grad=True)),
                clean.detach(),
                self.penalty(job, driver, [(cut, x, prediction)]),
            )
        walk = driver.rollout(
            kernel,
            x=x,
            start=cut,
            grad=True,
            quiet=True,
            dtype=torch.float32,
            keep_predictions=bool(self.config.anchor),
        )
        seen = [(cut + k, walk.latents[k].detach(), prediction) for k, prediction in enumerate(walk.predictions)]
        return _pixels(walk.media), walk.latents[-1].detach(), self.penalty(job, driver, seen)

    def again(self, job: Job, driver: Driver, clean: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Media and penalty of the last step, from the finished image made noisy with other noise."""
        last = driver.length - 1
        x = driver.levels.noised(clean, case_noise(driver.seeds, clean, "once more", k), last)
        prediction = driver.predict(x, last, grad=True)
        made = driver.decode(driver.levels.denoised(x, prediction, last), grad=True)
        return _pixels(made), self.penalty(job, driver, [(last, x, prediction)])

    def penalty(self, job: Job, driver: Driver, seen: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
        """The weighted distance (B,) of predictions to the base model's, as a mean over steps."""
        if not self.config.anchor:
            return torch.zeros(driver.batch)
        with torch.no_grad(), job.trained.reference():
            bases = [driver.predict(x, i) for i, x, _ in seen]
        gaps = [mean_error(prediction, base) for (_, _, prediction), base in zip(seen, bases, strict=True)]
        return self.config.anchor * torch.stack(gaps).mean(0)

    def _back(
        self,
        job: Job,
        micro: Images,
        made: Tensor,
        penalty: Tensor,
        scale: float,
        share: float,
        told: dict[str, Tensor],
    ) -> None:
        """Score, and go back through what was drawn."""
        job.budget.charge(reward_calls=len(micro) * len(job.members))
        scores = [scoring.score(reward, made, micro.cases, all_invalid=True).total for reward, _ in job.members]
        members = torch.stack(scores, 1)
        total, valid = job.total(members), ~job.total(members.detach()).isnan()
        if len(self._seen) < -(-job.config.images // job.processes // job.config.micro_batch):
            self._seen.append(members.detach().cpu())
        loss = self.config.loss(total[valid]).sum() + penalty.to(total)[valid].sum()
        loss = loss * (scale / len(micro))
        job.backward(loss * share)
        found = {
            "loss": loss,
            "reward": total.detach().nanmean().nan_to_num(),
            "invalid": (~valid).float().mean(),
        }
        for name, value in found.items():
            told[name] = told[name] + value.detach().float().cpu() * share


def _pixels(made: Any) -> Tensor:
    return media.to_tensor(made).float()


OBJECTIVE = Direct
