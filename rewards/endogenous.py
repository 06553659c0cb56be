"""What a diffusion model's own denoising errors say of a picture: `likelihood_ratio` and `self_confidence`.

`likelihood_ratio` is the implicit classifier of a conditional model: how much better it takes off known noise when it
reads the prompt than when it reads none (Alexander C. Li et al.: "Your Diffusion Model is Secretly a Zero-Shot
Classifier", 2023, arXiv 2303.16203; as a reward after "Generalist Reward Models", 2025, arXiv 2506.23235). With the
scale `absolute`, the weighting `likelihood` and the convention `sum` it tends to log p(x|c) - log p(x) in nats
(Xianghao Kong et al.: "Information-Theoretic Diffusion", 2023, arXiv 2302.03792). `self_confidence` is SOLACE
(Seungwook Kim, Minsu Cho: "Improving Text-to-Image Generation with Intrinsic Self-Confidence Rewards", 2026, arXiv
2603.00918): minus the log error on antithetic probes, over the last share of the steps, without guidance.

Where we differ: by default each level of `likelihood_ratio` adds the log of its two errors' ratio, since a sum of
differences, as published, is ruled by how much a picture leaves to guess (`scale: absolute` is that sum). Levels are
those of the pipeline's own schedule, at their true index; noise is drawn from the option `seed`, the same for every
picture. SOLACE's code standardises each step over the batch and weights it by t (1 - t); here each step counts the
same and no score depends on its batch. Models that predict no velocity are asked for the one their prediction implies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.endogenous import LatentModel, card_call, load_model, version_of
from diffalign.errors import ConfigError
from diffalign.probes import Probes, Target, Value, Weighting, probe, target_of
from diffalign.registry import register_reward
from diffalign.scoring import Score

EMBEDDED = "shapes-sd3"
Dtype = Literal["float32", "float16", "bfloat16"]
Convention = Literal["sum", "mean"]
Scale = Literal["relative", "absolute"]
TINY = 1e-12  # keeps the logarithm of no error at all finite


class _Endogenous:
    """A diffusion model asked about pictures: by an embedded name, a folder, a hub id, or from Python a pipeline."""

    reads_prompt = True
    probes: Probes
    weighting: Weighting
    branches: int  # predictions of each noised picture

    def __init__(
        self, model: Any, revision: str | None, dtype: Dtype, call: dict[str, Any] | None, micro_batch: int | None
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch is {micro_batch}, but at least 1 row goes through the model at a time.")
        self.model, self.revision, self.dtype, self.call, self.micro_batch = model, revision, dtype, call, micro_batch
        named = model if isinstance(model, str) else type(model).__name__
        self._shared = {"model": named, "revision": revision, "dtype": dtype, "call": call}  # a chunk changes no score

    @cached_property
    def weights(self) -> str | None:
        """What tells the weights from others, as of when it is first asked: these are the weights that are loaded."""
        return version_of(self.model, self.revision) if isinstance(self.model, str) else None

    @property
    def version(self) -> str | None:
        """Our revision of the computation, and the weights; None for a pipeline from Python: it may be in training."""
        return None if self.weights is None else f"1 {self.weights}"

    @property
    def rows_per_image(self) -> int:
        """Model rows (NFE) that the score of one picture costs; its gradient costs twice as many more."""
        return self.branches * len(self.probes.levels) * self.probes.draws

    @cached_property
    def latent_model(self) -> LatentModel:
        if not isinstance(self.model, str):
            return LatentModel(self.model, self.call)
        pipe = load_model(self.model, self.revision, getattr(torch, self.dtype), self.weights)
        return LatentModel(pipe, card_call(self.model) | (self.call or {}))

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        sound = media.detach().flatten(1).isfinite().all(1)
        if not sound.any():
            return Score(media.new_full((len(media),), torch.nan))
        if sound.all():
            return self._judge(media, cases)
        rows = [case for case, whole in zip(cases, sound.tolist(), strict=True) if whole]
        return self._judge(media[sound], rows).spread(sound)

    def _judge(self, media: Tensor, cases: Sequence[Case]) -> Score:
        """The score of finite pictures."""
        raise NotImplementedError

    def _probe(self, media: Tensor, branches: Sequence[Sequence[str]], value: Value) -> tuple[Tensor, Tensor]:
        """Scores (B,) and errors (L, C, M, B), back on the device of the media."""
        model = self.latent_model
        if isinstance(self.model, str):
            model.move(media.device)
        else:
            model.forget()
        with torch.autocast(media.device.type, enabled=False):
            pictures = model.fitted(media.to(model.pipe.device))
            size = (int(pictures.shape[-2]), int(pictures.shape[-1]))
            denoise = model.denoiser([prompt for branch in branches for prompt in branch], size)
            levels, x0 = model.levels(size), model.clean(pictures)
            score, errors = probe(
                denoise, levels, x0, branches, self.probes, value, weighting=self.weighting, most=self.micro_batch
            )
        return score.to(media.device), errors.to(media.device)


@register_reward("likelihood_ratio", differentiable=True)
class LikelihoodRatio(_Endogenous):
    """How much smaller the model's denoising error is with the prompt than without, on the same noise."""

    branches = 2

    def __init__(
        self,
        model: Any = EMBEDDED,
        revision: str | None = None,
        dtype: Dtype = "float32",
        call: dict[str, Any] | None = None,
        levels: tuple[float, ...] = (0.45, 0.65, 0.85),
        draws: int = 4,
        antithetic: bool = True,
        scale: Scale = "relative",
        weighting: Weighting = "uniform",
        convention: Convention = "mean",
        empty: str = "",
        seed: int = 0,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(model, revision, dtype, call, micro_batch)
        self.weighting, self.empty, self.scale = weighting, empty, scale
        self.probes = Probes(
            levels=tuple(levels),
            draws=draws,
            antithetic=antithetic,
            seed=seed,
            target=target_of(weighting) if scale == "absolute" else "velocity",  # a ratio is the same for all three
            convention=convention,
        )
        self.options = self._shared | {
            "levels": list(levels),
            "draws": draws,
            "antithetic": antithetic,
            "scale": scale,
            "weighting": weighting,
            "convention": convention,
            "empty": empty,
            "seed": seed,
        }

    def _judge(self, media: Tensor, cases: Sequence[Case]) -> Score:
        branches = [[case.prompt for case in cases], [self.empty] * len(cases)]
        ratio, errors = self._probe(media, branches, self.advantage)
        prompted, bare = errors.mean((0, 2))
        return Score(ratio, {"likelihood_ratio": ratio, "error": prompted, "error_without_prompt": bare})

    def advantage(self, errors: Tensor) -> Tensor:
        """Errors (2, M, B) of one level with and without the prompt -> how much smaller they are with it (B,)."""
        prompted, bare = errors[0].mean(0), errors[1].mean(0)
        return bare - prompted if self.scale == "absolute" else (bare + TINY).log() - (prompted + TINY).log()


@register_reward("self_confidence", differentiable=True)
class SelfConfidence(_Endogenous):
    """Minus the log of the model's denoising error for the prompt, averaged over the last `share` of `steps` levels."""

    branches = 1
    weighting: Weighting = "uniform"

    def __init__(
        self,
        model: Any = EMBEDDED,
        revision: str | None = None,
        dtype: Dtype = "float32",
        call: dict[str, Any] | None = None,
        steps: int = 10,
        share: float = 0.6,
        draws: int = 8,
        antithetic: bool = True,
        delta: float = 1e-6,
        target: Target = "velocity",
        convention: Convention = "mean",
        seed: int = 0,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(model, revision, dtype, call, micro_batch)
        if steps < 1 or not 0 < share <= 1 or not delta >= 0:
            raise ConfigError(
                f"steps is {steps}, share {share:g} and delta {delta:g}, but at least 1 step, a share of them above 0 "
                "and at most 1, and a delta of at least 0 are needed."
            )
        looked_at = max(round(share * steps), 1)
        levels = tuple((k + 0.5) / steps for k in range(steps - looked_at, steps))
        self.delta = delta
        self.probes = Probes(
            levels=levels, draws=draws, antithetic=antithetic, seed=seed, target=target, convention=convention
        )
        self.options = self._shared | {
            "steps": steps,
            "share": share,
            "draws": draws,
            "antithetic": antithetic,
            "delta": delta,
            "target": target,
            "convention": convention,
            "seed": seed,
        }

    def _judge(self, media: Tensor, cases: Sequence[Case]) -> Score:
        score, errors = self._probe(media, [[case.prompt for case in cases]], self.confidence)
        return Score(score, {"self_confidence": score, "error": errors.mean((0, 1, 2))})

    def confidence(self, errors: Tensor) -> Tensor:
        """Errors (1, M, B) of one level -> minus the log of their mean (B,)."""
        return -(errors[0].mean(0) + self.delta).log()
