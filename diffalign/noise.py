"""One face for every noise schedule: `x_t = alpha_t x0 + sigma_t eps`, and the Gaussian transitions that walk down
it.

Follows: DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16) for `ddim`; Flow-GRPO (Liu et al. 2025, arXiv
2505.05470, eq. 9 and its published first-step rule) for `flow_sde`; coefficient-preserving sampling (2025, arXiv
2509.05952) for `cps`.

Where we differ: alpha and sigma are read off the scheduler's own `add_noise` / `scale_noise`, so one formula serves
variance-preserving, variance-exploding and flow latents in the pipeline's own scaling; `ddim` and `cps` therefore run
on all of them. Means and log-densities are float32 whatever the model's dtype. `cps` reports the true Gaussian log-
density. The first-step rule of `flow_sde` holds for starts just below pure noise too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.cases import candidate_seed, derived_seed
from diffalign.errors import ConfigError, SeamError

Convention = Literal["sum", "mean"]
NEARLY_NOISE = 0.99  # schedulers start at 1, 0.999999 or 0.9997 for one and the same thing; none starts in between


@dataclass(frozen=True)
class Levels:
    """The noise levels of one run: T steps go from level i to level i + 1; level T is the end of the chain."""

    alpha: Tensor  # (T + 1,) float64
    sigma: Tensor  # (T + 1,) float64
    prediction: str  # what the model predicts: epsilon, sample, v_prediction, flow
    unit: float = (
        1.0  # standard deviation of the start noise in the latents' own scaling, where sigma is not relative to 1
    )

    def __len__(self) -> int:
        return len(self.alpha) - 1

    def at(self, i: int) -> tuple[float, float]:
        """alpha and sigma of level i."""
        return float(self.alpha[i]), float(self.sigma[i])

    def denoised(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The clean latent that `prediction` (B, ...) at x_t (B, ...) points to, float32."""
        alpha, sigma = self.at(i)
        x, prediction = x.float(), prediction.float()
        if self.prediction == "sample":
            return prediction
        if self.prediction == "flow":
            return (x - sigma * prediction) / (alpha + sigma)
        if self.prediction == "v_prediction":
            sine = sigma / self.unit
            scale = math.hypot(alpha, sine)  # 1 for variance-preserving latents
            return (alpha / scale**2) * x - (sine / scale) * prediction
        if alpha == 0:
            raise SeamError(
                "the first level is pure noise, and an epsilon prediction there says nothing about the image."
            )
        return (x - sigma * prediction) / alpha

    def epsilon(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The noise that `prediction` at x_t points to, float32."""
        alpha, sigma = self.at(i)
        if self.prediction == "epsilon":
            return prediction.float()
        x0 = self.denoised(x, prediction, i)
        if sigma == 0:
            return torch.zeros_like(x0)
        return (x.float() - alpha * x0) / sigma

    def velocity(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The flow velocity eps - x0, float32."""
        if self.prediction == "flow":
            return prediction.float()
        return self.epsilon(x, prediction, i) - self.denoised(x, prediction, i)

    def target(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """What a perfect model predicts at level i where x0 (B, ...) was carried there with `noise`, float32."""
        x0, noise = x0.float(), noise.float()
        if self.prediction == "sample":
            return x0
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x0
        alpha, sine = float(self.alpha[i]), float(self.sigma[i]) / self.unit
        scale = math.hypot(alpha, sine)
        return (alpha * self.unit * noise - sine * x0) / scale

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """x0 (B, ...) carried to level i with `noise`, in the latents' own dtype."""
        alpha, sigma = self.at(i)
        return (alpha * x0.float() + sigma * noise.float()).to(x0.dtype)

    def jump(self, x: Tensor, prediction: Tensor, i: int, j: int) -> Tensor:
        """x (B, ...) carried from level i to any later level j by one deterministic DDIM step, in its own dtype."""
        alpha, sigma = self.at(j)
        x0, eps = self.denoised(x, prediction, i), self.epsilon(x, prediction, i)
        return (alpha * x0 + sigma * eps).to(x.dtype)

    def raised(self, x: Tensor, noise: Tensor, i: int, j: int) -> Tensor:
        """x (B, ...) of level i made noisier up to an earlier level j: what the forward process does between them."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(i), self.at(j)
        keep = alpha_s / alpha_t
        added = math.sqrt(max(sigma_s**2 - (keep * sigma_t) ** 2, 0.0))
        return (keep * x.float() + added * noise.to(x).float()).to(x.dtype)


def read_levels(scheduler: Any, timesteps: Tensor) -> Levels:
    """Levels of a scheduler whose `set_timesteps` has run, at the `timesteps` (T,) that a pipeline's loop visits."""
    add = getattr(scheduler, "add_noise", None) or getattr(scheduler, "scale_noise", None)
    if add is None and scheduler.config.get("prediction_type") == "trigflow":
        return _trigonometric(timesteps.detach().cpu().double(), float(scheduler.config.sigma_data))
    if add is None:
        raise SeamError(
            f"{type(scheduler).__name__} has neither add_noise nor scale_noise, so its noise levels are unknown."
        )
    timesteps, cut = timesteps.detach().cpu(), _stopped_at(scheduler, timesteps)
    if cut is not None:
        timesteps = torch.cat([timesteps, cut])
    one, zero = torch.ones(len(timesteps), dtype=torch.float64), torch.zeros(len(timesteps), dtype=torch.float64)
    by_name = add.__name__ == "scale_noise"
    alpha = add(one, timesteps, zero) if by_name else add(one, zero, timesteps)
    sigma = add(zero, timesteps, one) if by_name else add(zero, one, timesteps)
    if cut is None:
        last_alpha, last_sigma = _last_level(scheduler, flow=_is_flow(alpha, sigma))
        alpha, sigma = torch.cat([alpha, last_alpha]), torch.cat([sigma, last_sigma])
    alpha, sigma = alpha.double(), sigma.double()
    return Levels(alpha.cpu(), sigma.cpu(), _prediction_type(scheduler, flow=_is_flow(alpha[:-1], sigma[:-1])))


def _stopped_at(scheduler: Any, timesteps: Tensor) -> Tensor | None:
    """The timestep (1,) whose level a loop stops at before the end of its scheduler's chain; None at the end."""
    native, last = torch.as_tensor(scheduler.timesteps).detach().cpu(), timesteps[-1:].detach().cpu()
    places = (native == last).nonzero() if native.ndim == 1 else native[:0]
    following = int(places[-1]) + 1 if len(places) else len(native)
    return native[following : following + 1].to(last.dtype) if following < len(native) else None


def _trigonometric(angles: Tensor, unit: float) -> Levels:
    """Levels of a scheduler whose timesteps are angles: x_t = cos(t) x0 + unit sin(t) eps, and the model predicts v."""
    end = torch.tensor([0.0], dtype=torch.float64)
    angles = torch.cat([angles, end])
    return Levels(angles.cos(), unit * angles.sin(), "v_prediction", unit)


def _is_flow(alpha: Tensor, sigma: Tensor) -> bool:
    return bool(((alpha + sigma - 1).abs() < 1e-4).all())


def _last_level(scheduler: Any, *, flow: bool) -> tuple[Tensor, Tensor]:
    final = getattr(scheduler, "final_alpha_cumprod", None)
    sigmas = getattr(scheduler, "sigmas", None)
    if final is not None and not isinstance(sigmas, Tensor):
        final = torch.as_tensor(final, dtype=torch.float64).reshape(1)
        return final.sqrt(), (1 - final).sqrt()
    end = float(sigmas[-1]) if isinstance(sigmas, Tensor) and len(sigmas) else 0.0
    alpha = 1 - end if flow else 1.0
    return torch.tensor([alpha], dtype=torch.float64), torch.tensor([end], dtype=torch.float64)


def _prediction_type(scheduler: Any, *, flow: bool) -> str:
    named = scheduler.config.get("prediction_type", None)
    if named in ("epsilon", "sample", "v_prediction"):
        return str(named)
    if named in (None, "flow_prediction", "flow") and flow:
        return "flow"
    if named is None:
        return "epsilon"
    raise SeamError(
        f"{type(scheduler).__name__} predicts '{named}'. Known: epsilon, sample, v_prediction, flow_prediction."
    )


@dataclass(frozen=True)
class Transition:
    """A Gaussian step: mean (B, ...) float32 and one standard deviation; 0 means the step is deterministic."""

    mean: Tensor
    std: float

    def sample(self, noise: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """The next latent for standard normal `noise` (B, ...), rounded to `dtype`: a replay sees the same bits."""
        if self.std == 0 or noise is None:
            return self.mean.to(dtype or self.mean.dtype)
        return (self.mean + self.std * noise.to(self.mean)).to(dtype or self.mean.dtype)

    def log_prob(self, x: Tensor, convention: Convention = "sum") -> Tensor:
        """log N(x; mean, std^2) per case (B,), summed or averaged over elements; 0 where the step has no noise."""
        if convention not in ("sum", "mean"):
            raise ConfigError(
                f"log-density convention '{convention}' is unknown. Use 'sum' (the density) or 'mean' (per element)."
            )
        if self.std == 0:
            return self.mean.flatten(1).sum(1) * 0
        z = (x.detach().float() - self.mean) / self.std
        each = (-0.5 * z**2 - math.log(self.std) - 0.5 * math.log(2 * math.pi)).flatten(1)
        return each.sum(1) if convention == "sum" else each.mean(1)


Kernel = Callable[[Levels, Tensor, Tensor, int], Transition]


def _renoise(levels: Levels, x: Tensor, prediction: Tensor, i: int, std: float) -> Transition:
    alpha, sigma = levels.at(i + 1)
    x0, eps = levels.denoised(x, prediction, i), levels.epsilon(x, prediction, i)
    return Transition(alpha * x0 + math.sqrt(max(sigma**2 - std**2, 0.0)) * eps, std)


def ddim(eta: float = 0.0) -> Kernel:
    """DDIM with `eta` of the posterior's noise: 0 is the deterministic sampler, 1 the ancestral one."""
    if not eta >= 0:
        raise ConfigError(f"eta is {eta}, but a share of noise cannot be negative.")

    def step(levels: Levels, x: Tensor, prediction: Tensor, i: int) -> Transition:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels.at(i), levels.at(i + 1)
        if sigma_t == 0:
            return _renoise(levels, x, prediction, i, 0.0)
        gained = max(sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2, 0.0)
        return _renoise(levels, x, prediction, i, min(eta * sigma_s / sigma_t * math.sqrt(gained), sigma_s))

    return step


def cps(a: float = 0.8) -> Kernel:
    """Coefficient-preserving step: the share sin(a pi/2) of the next level's noise is fresh.

    Exact on point-mass data only; on Gaussian data of variance .25 with T = 10 and a = .8 the final variance is .124.
    """
    if not 0 <= a <= 1:
        raise ConfigError(
            f"cps noise level a is {a}, but it must lie between 0 (deterministic) and 1 (all noise fresh)."
        )

    def step(levels: Levels, x: Tensor, prediction: Tensor, i: int) -> Transition:
        return _renoise(levels, x, prediction, i, levels.at(i + 1)[1] * math.sin(a * math.pi / 2))

    return step


def flow_sde(a: float = 0.7) -> Kernel:
    """Euler-Maruyama step of the reverse SDE with g = a sqrt(s / (1 - s)); at the start the second level bounds g."""
    if not a >= 0:
        raise ConfigError(f"flow_sde noise level a is {a}, but it cannot be negative.")

    return lambda levels, x, prediction, i: _euler_maruyama(levels, x, prediction, i, flow_diffusion(levels, i, a))


def diffused(g: Sequence[float]) -> Kernel:
    """Euler-Maruyama step of the reverse SDE with one diffusion coefficient per step, as DenseGRPO calibrates them."""
    if not all(each >= 0 for each in g):
        raise ConfigError(f"a diffusion coefficient is {min(g)}, but it cannot be negative.")
    return lambda levels, x, prediction, i: _euler_maruyama(levels, x, prediction, i, g[i])


def flow_diffusion(levels: Levels, i: int, a: float) -> float:
    """g of `flow_sde` at step i: a sqrt(s / (1 - s)), with the second level in the denominator where a chain starts
    from (nearly) pure noise: there x keeps a share above 1 - a^2 / 2, while s = 0.999999 itself would give g = 1000 a.
    """
    s = levels.at(i)[1]
    below = levels.at(i + 1)[1] if s >= 1 or (i == 0 and s > NEARLY_NOISE) else s
    if below >= 1 or s == 0:
        raise SeamError("flow_sde needs a second noise level below 1. Use at least 2 steps.")
    return a * math.sqrt(s / (1 - below))


def _euler_maruyama(levels: Levels, x: Tensor, prediction: Tensor, i: int, g: float) -> Transition:
    if levels.prediction != "flow":
        raise SeamError(
            f"flow_sde needs a flow model, and this one predicts {levels.prediction}. Use ddim(eta=1) instead."
        )
    s, h = levels.at(i)[1], levels.at(i)[1] - levels.at(i + 1)[1]
    x, v = x.float(), prediction.float()
    mean = x * (1 - g * g * h / (2 * s)) - h * v * (1 + g * g * (1 - s) / (2 * s))
    return Transition(mean, g * math.sqrt(h))


def stepwise(kernels: Sequence[Kernel]) -> Kernel:
    """A kernel of its own for every step."""
    return lambda levels, x, prediction, i: kernels[i](levels, x, prediction, i)


KERNELS: dict[str, Callable[..., Kernel]] = {"ddim": ddim, "cps": cps, "flow_sde": flow_sde}


def case_generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator that depends on the case's seed and the named stream only, never on the batch."""
    return torch.Generator("cpu").manual_seed(derived_seed(seed, *stream))


def case_noise(seeds: Sequence[int], like: Tensor, *stream: str | int) -> Tensor:
    """Standard normals shaped like `like` (B, ...): row k is drawn from seed k alone, on the CPU, then moved."""
    rows = [torch.randn(like.shape[1:], generator=case_generator(seed, *stream)) for seed in seeds]
    return torch.stack(rows).to(like.device)


def forked(seeds: Sequence[int], rows: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """Seeds of candidates: number `numbers[k]` of case `rows[k]`; number 0 is the case's own seed."""
    return [candidate_seed(seeds[row], number) for row, number in zip(rows, numbers, strict=True)]
