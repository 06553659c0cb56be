"""VLM-RM: a CLIP score whose space is stretched along the way from a baseline prompt to a goal.

Juan Rocamonde et al.: "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning", 2023
(arXiv 2310.12921), definition 1. With unit embeddings, g the mean of the goal prompts, b that of the baseline prompts,
d = g - b and x the picture's: R = 1 - |M (x - g)|^2 / 2 with M = alpha d d'/|d|^2 + (1 - alpha) I.

Where we differ:
- Without `goal`, each case's own prompt is its goal, and `{prompt}` in a goal or baseline stands for it; the paper
  has one fixed goal per task.
- The default baseline, "a picture", is ours; alpha is that of the published example.
- The published code resizes tensors, with antialias from torchvision 0.17 on and without before; we always do.
- It scores under inference mode; ours passes the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.clip_tower import EMBEDDED, ClipTower, Dtype
from diffalign.errors import ConfigError
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.vision import ROUNDED, Preprocess, Route

NONE = 1e-4  # a shorter way from baseline to goal is rounding


@register_reward("vlm_rm", differentiable=True, range=(-1.0, 1.0))
class VLMRM:
    """1 at the goal; alpha 0 is the cosine, alpha 1 counts the way from baseline to goal only."""

    reads_prompt = True

    def __init__(
        self,
        goal: tuple[str, ...] | None = None,
        baseline: tuple[str, ...] = ("a picture",),
        alpha: float = 0.5,
        model: str = EMBEDDED,
        revision: str | None = None,
        dtype: Dtype = "float32",
        path: Route = "auto",
        checkpointing: bool = False,
    ) -> None:
        self.goal, self.baseline, self.alpha = ("{prompt}",) if goal is None else tuple(goal), tuple(baseline), alpha
        if not 0 <= alpha <= 1:
            raise ConfigError(f"vlm_rm.alpha is {alpha}, but it mixes two spaces: give 0 (cosine) to 1 (projection).")
        if not self.goal or not self.baseline:
            raise ConfigError(
                "vlm_rm needs at least one goal and one baseline prompt; leave `goal` out for the case's."
            )
        if set(self.goal) == set(self.baseline):
            raise self._no_way(self.goal, self.baseline)
        self.options = {"goal": self.goal, "baseline": self.baseline, "alpha": alpha, "model": model}
        self.options |= {"revision": revision, "dtype": dtype, "path": path}
        self.differentiable, self.no_gradient = path != "reference", ROUNDED
        self.tower = ClipTower(
            model, revision=revision, dtype=dtype, path=path, checkpointing=checkpointing, adapt=squashed
        )

    @property
    def version(self) -> str:
        return f"1 {self.tower.source.version}"

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        x = self.tower.images(media)  # (B, D)
        g, b = self._mean(self.goal, cases, media.device), self._mean(self.baseline, cases, media.device)
        self._require_a_way(g, b, cases)
        cosines = {"goal": torch.cosine_similarity(x, g), "baseline": torch.cosine_similarity(x, b)}
        return Score(regularised(x, g, b, self.alpha), cosines)

    def _mean(self, templates: Sequence[str], cases: Sequence[Case], device: torch.device) -> Tensor:
        """(B, D): the mean of each case's prompts, whose length stays below 1 where they disagree."""
        prompts = [template.replace("{prompt}", case.prompt) for case in cases for template in templates]
        return self.tower.texts(prompts, device).view(len(cases), len(templates), -1).mean(1)

    def _require_a_way(self, g: Tensor, b: Tensor, cases: Sequence[Case]) -> None:
        same = ((g - b).norm(dim=-1) < NONE).nonzero().flatten().tolist()
        if same:
            prompt = cases[same[0]].prompt
            raise self._no_way(*([t.replace("{prompt}", prompt) for t in kind] for kind in (self.goal, self.baseline)))

    @staticmethod
    def _no_way(goal: Sequence[str], baseline: Sequence[str]) -> ConfigError:
        return ConfigError(
            f"the goal {', '.join(map(repr, goal))} and the baseline {', '.join(map(repr, baseline))} are the same to "
            "the model, so there is no way from one to the other. Give a baseline that says less than the goal."
        )


def regularised(x: Tensor, g: Tensor, b: Tensor, alpha: float) -> Tensor:
    """R of pictures x, goals g and baselines b, all (B, D) -> (B,)."""
    away = x - g
    mixed = alpha * along(away, g - b) + (1 - alpha) * away  # M (x - g)
    return 1 - mixed.square().sum(-1) / 2


def along(v: Tensor, d: Tensor) -> Tensor:
    """P v: the share of v (B, D) that lies along d."""
    return d * ((v * d).sum(-1, keepdim=True) / d.square().sum(-1, keepdim=True))


def squashed(preprocess: Preprocess) -> Preprocess:
    """The whole picture, its aspect ignored, resized as a tensor."""
    return replace(preprocess, fit="squash", published="torch")
