"""Tree GRPO: images of a prompt share the beginning of their walks, and each branch is judged by what grows from it.

Papers: "TreeGRPO: Tree-Advantage GRPO for Online RL Post-Training of Diffusion Models", Ding and Ye, 2025 (arXiv
2512.08153), as `advantage: fused`; BranchGRPO, 2025 (arXiv 2509.06040), as `advantage: depth`, with its pruning of
children as `prune`; V-STAR, "Spend Search Where It Pays: Value-Guided Structured Sampling and Optimization for
Generative Recommendation", Jiang et al., 2026 (arXiv 2602.10699), as `advantage: sibling`; the branching of
"TempFlow-GRPO: When Timing Matters for GRPO in Flow Models", He et al., 2025 (arXiv 2508.04324), is depth 1 of it.

Where we differ: branches grow at neighbouring steps, those of the noise window. A prompt has several trees, whose roots
are start noises of their own, and leaves are compared over all of them. The noise of a branch is never scaled apart
from its density. A transition whose siblings share its start is replayed with one model call for all of them. With one
branch per node the trees are chains, and `fused` is Flow-GRPO to the bit; `tree_ess`, which it logs, is the effective
number of children behind a fused advantage, 1 where one child's density decides. `advantage.eps` is added to the
deviations of all three (BranchGRPO has 1e-8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign import media, shaping
from diffalign.cases import Case
from diffalign.drive import Driver
from diffalign.errors import ConfigError
from diffalign.noise import Kernel, Transition, case_noise
from diffalign.train import tree_credit
from diffalign.train.advantage_config import AdvantageConfig
from diffalign.train.job import Job
from diffalign.train.objective import Collected
from diffalign.train.objectives.flow_grpo import FlowGRPO, FlowGRPOConfig, clip_figures, clipped_loss
from diffalign.train.policy import FIGURES
from diffalign.train.schedules import NoiseConfig
from diffalign.train.trees_of_walks import Grove, Layer, child_seed, deviation, forest, spread


@dataclass(frozen=True, kw_only=True)
class TreeGRPOConfig(FlowGRPOConfig):
    """Flow-GRPO's settings, and how walks branch; group_size is roots x branches ^ noise.window."""

    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(window=3, rule="geometric"))
    branches: int = 2  # children of a node at each step of the window
    advantage: Literal["sibling", "fused", "depth"] = "sibling"  # against siblings, fused from leaves, or by depth
    alpha: float = 1.0  # share of the sibling advantage; the rest compares the leaves below with the whole group
    scale: bool = True  # siblings' advantages in their own deviations, or in reward units over the group's
    prune: Literal["none", "best", "extremes"] = "none"  # children to train: all, the best half, best and worst

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 1:
            raise ConfigError(f"branches is {self.branches}, but a node needs at least 1 child.")
        if self.noise.window < 1:
            raise ConfigError("noise.window is 0, but a tree branches at the steps of a window. Use 2 or 3.")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}, but a share lies between 0 and 1.")
        if self.credit.similarity != "none" or self.credit.phases or self.credit.weighting == "ratio_norm":
            raise ConfigError(
                "credit has similarity, phases or ratio_norm, but a tree credits its steps by what grows from them. "
                "Leave them out; weighting: tempflow is fine."
            )
        if self.advantage != "sibling" and (self.alpha != 1 or not self.scale):
            raise ConfigError(f"alpha and scale belong to advantage: sibling, and this job has {self.advantage}.")
        if self.same_start:
            raise ConfigError("same_start belongs to walks side by side; a tree has one start per root already.")

    @property
    def leaves(self) -> int:
        """Leaves of one tree."""
        return int(self.branches**self.noise.window)


class TreeGRPO(FlowGRPO):
    """Flow-GRPO on trees."""

    name: ClassVar[str] = "tree_grpo"
    settings: ClassVar[type[TreeGRPOConfig]] = TreeGRPOConfig
    config: TreeGRPOConfig

    def check(self, job: Job) -> None:
        super().check(job)
        size, leaves = job.config.group_size, self.config.leaves
        told = f"branches {self.config.branches} at {self.config.noise.window} steps make {leaves} leaves"
        if size % leaves:
            raise ConfigError(f"group_size is {size}, but {told}. Use a multiple, such as group_size={max(2, leaves)}.")
        if job.config.micro_batch % size:
            raise ConfigError(
                f"micro_batch is {job.config.micro_batch}, but trees of a prompt stay together: use {size}."
            )
        given = job.config.advantage
        read = AdvantageConfig(missing=given.missing, eps=given.eps, adv_scale=given.adv_scale, clip=given.clip)
        if given != read:
            raise ConfigError(
                "advantage has settings that a tree does not read: tree_grpo compares nodes by its own `advantage`, "
                "and of these takes missing, eps, adv_scale and clip. Drop the others."
            )

    def collect(self, job: Job, step: int) -> Collected:
        groves, rewards = self.sampled(job, step, job.cases_of(step))
        members = job.gather(rewards)
        invalid = job.require_valid(members, step)
        total = job.total(rewards)
        first, effective = 0, []
        for grove in groves:
            effective.append(self._credit(job, grove, total[first : first + len(grove)]))
            first += len(grove)
        every = job.total(members)
        told = {
            "reward": float(every.nanmean()),
            "invalid": invalid,
            "frac_zero_std": shaping.frac_zero_std(every, job.group_ids),
            "advantage_std": float(job.gather(torch.cat([a.advantages for g in groves for a in g.layers])).std()),
        }
        if self.config.advantage == "fused":
            told["tree_ess"] = float(torch.cat(effective).nanmean())
        return Collected(groves, job.mean(told))

    def sampled(self, job: Job, step: int, cases: Sequence[Case]) -> tuple[list[Grove], Tensor]:  # type: ignore[override]
        """Trees in micro-batches and the rewards (n, K) of their leaves."""
        kernel, window = self.noise(job, step)
        return self.scored(job, cases, lambda _, chunk: self.grow(job, chunk, kernel, window))

    def grow(self, job: Job, cases: Sequence[Case], kernel: Kernel, window: range) -> Grove:
        """The trees of some cases: every `leaves`-th of them is a root, and has its own start."""
        roots, layers = list(cases)[:: self.config.leaves], []
        nodes, driver = roots, job.driver(roots)
        with torch.no_grad():
            x = driver.start()
            if window.start:
                walk = driver.rollout(
                    kernel, x=x, stop=window.start, quiet=True, dtype=torch.float32, output_type="latent"
                )
                x = walk.latents[-1]
            for i in window:
                layer, nodes = self._branch(driver, nodes, kernel, x, i)
                layers.append(layer)
                x, driver = layer.moves, job.driver(nodes)
            made = driver.rollout(kernel, x=x, start=window.stop, quiet=True, dtype=torch.float32).media
        return Grove(layers, nodes, media.to_tensor(made).float(), kernel)

    def _branch(
        self, driver: Driver, nodes: Sequence[Case], kernel: Kernel, x: Tensor, i: int
    ) -> tuple[Layer, list[Case]]:
        """One model call for all nodes, then children by noise of their own."""
        k = self.config.branches
        with torch.enable_grad():  # as a replay runs it, so that the ratio is exactly 1
            prediction = driver.predict(x, i, grad=True).detach()
        step = spread(kernel(driver.levels, x, prediction, i), parent := torch.arange(len(nodes)).repeat_interleave(k))
        cases = [node.with_seed(child_seed(node.seed, i, b)) for node in nodes for b in range(k)]
        moves = step.sample(case_noise([case.seed for case in cases], step.mean, "step", i))
        return Layer(i, driver, x, parent, moves, step.log_prob(moves, self.config.density)), cases

    # advantages

    def _credit(self, job: Job, grove: Grove, rewards: Tensor) -> Tensor:
        """Advantages of every edge of a grove from the rewards (L,) of its leaves; effective children of its nodes."""
        parent, depth, log_prob, leaf = forest(grove, rewards, self.config.density)
        per_prompt = job.config.group_size // self.config.leaves  # trees of a prompt
        roots = tree_credit.tree_of(parent)
        gid = roots // per_prompt  # roots are numbered first, prompt by prompt
        told, settings = self.config, job.config.advantage
        overall = tree_credit.global_advantages(parent, depth, leaf, gid, eps=settings.eps)
        value = tree_credit.node_rewards(parent, depth, leaf)
        if told.advantage == "fused":
            own = tree_credit.leaf_advantages(parent, leaf, gid, eps=settings.eps)
            own = torch.where(leaf.isnan(), torch.nan, own)  # a leaf without a reward counts nowhere
            found = tree_credit.fused_advantages(parent, depth, own, log_prob)
        elif told.advantage == "depth":
            found = tree_credit.depth_advantages(parent, depth, value, gid, eps=settings.eps)
        else:
            found = tree_credit.sibling_advantages(parent, value, scale=told.scale, eps=settings.eps)
            if not told.scale:
                found = found / (deviation(rewards, job.config.group_size)[gid] + settings.eps)
            found = told.alpha * found + (1 - told.alpha) * overall
        if told.prune != "none":
            keep = tree_credit.keep_best if told.prune == "best" else tree_credit.keep_extremes
            found = torch.where(keep(parent, depth, value), found, 0)
        found = (found * settings.adv_scale).clamp(-settings.clip, settings.clip)
        first = int((parent < 0).sum())
        for layer in grove.layers:
            layer.advantages = found[first : first + len(layer.moves)].float()
            first += len(layer.moves)
        children = tree_credit.effective_children(parent, tree_credit.fusion_weights(parent, log_prob, ~value.isnan()))
        return torch.where(children > 0, children, torch.nan)

    # learning

    def learn(self, job: Job, micro: Grove, share: float) -> dict[str, Tensor]:  # type: ignore[override]
        """Every layer once: one model call for its nodes, a ratio for each of their children."""
        named = (*FIGURES, "kl") if self.config.beta else FIGURES
        sums, depth = dict.fromkeys(named, torch.zeros(())), len(micro.layers)
        nu = torch.tensor([micro.kernel(a.driver.levels, a.x[:1], a.x[:1], a.i).std for a in micro.layers])
        h = torch.tensor([float(a.driver.levels.sigma[a.i] - a.driver.levels.sigma[a.i + 1]) for a in micro.layers])
        weights = self.step_weights(nu, h)
        low, high = self.config.ranges(micro.elements)
        for k, layer in enumerate(micro.layers):
            if not bool(layer.advantages.any()) and not self.config.beta and not job.sharded:
                sums["ratio_mean"] = sums["ratio_mean"] + share / depth
                continue
            log_prob, alone, prediction = self._edges(micro, layer)
            log_ratio = log_prob - layer.log_probs
            advantage = layer.advantages.to(log_ratio)
            policy = clipped_loss(log_ratio, advantage, low, high)
            told = clip_figures(log_ratio, advantage, low, high)
            loss = policy.mean() * float(weights[k])
            if self.config.beta:
                told["kl"] = self._from_base(job, micro, layer, (alone, prediction)).mean()
                loss = loss + self.config.beta * told["kl"]
            for name, figure in {**told, "loss": loss}.items():
                sums[name] = sums[name] + figure.detach().cpu() * (share / depth)
            job.backward(loss * (share / depth))
        return sums

    def _from_base(self, job: Job, micro: Grove, layer: Layer, now: tuple[Transition, Tensor]) -> Tensor:
        """How far the nodes' transitions (P,) are from the base model's."""
        levels = layer.driver.levels
        with torch.no_grad(), job.trained.reference():
            prediction = layer.driver.predict(layer.x, layer.i)
        base = micro.kernel(levels, layer.x, prediction, layer.i), prediction
        return self.divergence(levels, layer.x, layer.i, now, base)

    def replayed(self, job: Job, micro: Grove) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Log-densities of all edges under the weights that sampled, and under the present ones."""
        again = [self._edges(micro, layer)[0].detach() for layer in micro.layers]
        return torch.cat([layer.log_probs for layer in micro.layers]), torch.cat(again)

    def pretend(self, micro: Grove) -> None:  # type: ignore[override]
        """Advantages of both signs, to try a gradient with."""
        for layer in micro.layers:
            layer.advantages = torch.ones(len(layer.moves))
            layer.advantages[1::2] = -1.0

    def _edges(self, micro: Grove, layer: Layer) -> tuple[Tensor, Transition, Tensor]:
        """Present log-densities (C,) of a layer's moves, with its nodes' transitions and predictions."""
        with torch.enable_grad():
            prediction = layer.driver.predict(layer.x, layer.i, grad=True)
        alone = micro.kernel(layer.driver.levels, layer.x, prediction, layer.i)
        return spread(alone, layer.parent).log_prob(layer.moves, self.config.density), alone, prediction


OBJECTIVE = TreeGRPO
