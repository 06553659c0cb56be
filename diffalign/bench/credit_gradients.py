"""Policy gradients of many credits on the same walks, and how much of each is signal.

At a frozen policy every ratio is 1 and no clip is active, so the gradient of a method is the mean over walks of the sum
over steps of w_i A_i grad log p_i: one forward pass serves them all, with a backward pass for each credit.

Letters: N walks, S steps, F credits, D trained numbers, K parts (training steps, each with prompts of its own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.noise import Convention, Transition
from diffalign.train import influence
from diffalign.train.job import Job
from diffalign.train.rollout import Rollout

Look = Callable[[Rollout, int, Tensor], None]  # told of every replayed step: walks, index, noise


def gradients(
    job: Job, rollouts: Sequence[Rollout], A: Tensor, weights: Tensor, convention: Convention, look: Look | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients (F, D) of the losses of credits A (F, N, S) with step weights (F, S), and (S, D) of the first alone."""
    parameters = job.trained.parameters()
    sums = torch.zeros(len(A), sum(p.numel() for p in parameters))
    steps = torch.zeros(A.shape[2], sums.shape[1])
    first = 0
    for rollout in rollouts:
        mine = A[:, first : first + len(rollout)] / A.shape[1]
        first += len(rollout)

        def on_step(
            i: int, prediction: Tensor, step: Transition, log_prob: Tensor, micro: Rollout = rollout, a: Tensor = mine
        ) -> None:
            k = i - micro.trained.start
            for f in range(len(a)):
                told = -a[f, :, k].to(log_prob)
                found = torch.autograd.grad(log_prob, parameters, told, retain_graph=True, allow_unused=True)
                flat = _flat(found, parameters)
                sums[f] += float(weights[f, k]) * flat
                if f == 0:
                    steps[k] += flat
            if look is not None:
                look(micro, i, ((micro.walk.moves[i] - step.mean) / step.std).detach())

        rollout.replay(convention, on_step)
    return sums / A.shape[2], steps / A.shape[2]


def _flat(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Gradients side by side (D,) on the CPU; a weight without one has 0."""
    each = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return torch.cat([g.detach().float().flatten() for g in each]).cpu()


def ratio(parts: Tensor) -> float:
    """||mean g||^2 / mean ||g - mean g||^2 of the gradients (K, D) of parts: 1 / (K - 1) where there is no signal."""
    mean = parts.double().mean(0)
    return float(mean.square().sum() / (parts.double() - mean).square().sum(1).mean())


def signal(gram: Tensor) -> float:
    """The same for one part from inner products (K, K), without what noise adds to the mean: 0 where there is none."""
    shared = _apart(gram)
    return float(shared / (gram.diagonal().mean() - shared))


def cosine(cross: Tensor, own: Tensor, other: Tensor) -> float:
    """The cosine of two expected gradients from inner products (K, J), (K, K), (J, J) of parts, as noise would allow.

    Equal numbers are the same part, and left out; NaN where noise hides one of the two.
    """
    size = float(_apart(own) * _apart(other)) if min(_apart(own), _apart(other)) > 0 else math.nan
    return float(_apart(cross)) / math.sqrt(size)


def _apart(products: Tensor) -> Tensor:
    """The mean product of different parts."""
    different = ~torch.eye(*products.shape, dtype=torch.bool)
    return products[different].mean()


def jackknife(figure: Callable[[Tensor], float], parts: int) -> dict[str, float]:
    """A figure of the numbers of parts, with the 95 % interval that leaving out one after the other gives."""
    from scipy.stats import t

    whole = torch.arange(parts)
    left = torch.tensor([figure(whole[whole != k]) for k in range(parts)], dtype=torch.float64)
    error = float(((parts - 1) * (left - left.mean()).square().mean()).sqrt())
    half, mean = float(t.ppf(0.975, parts - 1)) * error, figure(whole)
    return {"mean": mean, "lo": mean - half, "hi": mean + half}


class Influence:
    """Gathers what THR needs while gradients are taken: noises and features of the denoiser's middle, step by step."""

    def __init__(self, job: Job) -> None:
        self.job, self.latest = job, torch.empty(0)
        self.noises, self.features = dict[int, list[Tensor]](), dict[int, list[Tensor]]()

    @contextmanager
    def hooked(self) -> Iterator[Influence]:
        handle = middle(next(iter(self.job.trained.denoisers.values()))).register_forward_hook(self._keep)
        try:
            yield self
        finally:
            handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        found = output[-1] if isinstance(output, tuple) else output  # the image's part comes last
        pooled = found.detach().float()
        self.latest = pooled.mean(1) if pooled.ndim == 3 else pooled.flatten(2).mean(2)

    def __call__(self, rollout: Rollout, i: int, noise: Tensor) -> None:
        self.noises.setdefault(i, []).append(noise.cpu())
        self.features.setdefault(i, []).append(self.latest[-len(rollout) :].cpu())  # guidance puts other rows first

    def thr(self, A: Tensor, gid: Tensor) -> Tensor:
        """THR (N, S) of walks with advantages (N, S)."""
        kernels = [
            influence.kernel(torch.cat(self.noises[i]), torch.cat(self.features[i])) for i in sorted(self.noises)
        ]
        return torch.stack([influence.thr(K, A[:, k], gid) for k, K in enumerate(kernels)], 1)


def middle(denoiser: nn.Module) -> nn.Module:
    """The middle block of a denoiser: what it calls so, or the one in the middle of its longest list of blocks."""
    named = getattr(denoiser, "mid_block", None)
    if isinstance(named, nn.Module):
        return named
    lists = [module for module in denoiser.children() if isinstance(module, nn.ModuleList) and len(module)]
    longest = max(lists, key=len, default=nn.ModuleList([denoiser]))
    return longest[len(longest) // 2]
