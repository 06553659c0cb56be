"""How far a reward was optimised past what it stands for: gains, gap, frontier, turn-over and scaling fits.

Papers: "Scaling Laws for Reward Model Overoptimization", Gao, Schulman and Hilton, 2022 (arXiv 2210.10760): the two
curves of gold reward against the root of the KL divergence.

Rewards are (N,), one per image, higher is better; `prompts` (N,) says which images share a prompt. NaN is invalid and
left out, together with the image it would be compared with. The proxy is the reward that trains; gold is held out.

Where we differ: the fits are linear least squares in (alpha, beta) over all points at once; gains are in units of the
base model's spread within a prompt, so that scorers of any scale can be compared and averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.intervals import Interval, bootstrap

LEAST_PROXY_GAIN = 0.1  # below it the share of a gain that transfers is a ratio of noises
Form = Literal["rl", "best_of_n"]


@dataclass(frozen=True)
class Gain:
    """A mean change since the base model and its standard error over prompts."""

    value: float
    se: float


def by_prompt(values: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the valid values of every prompt, NaN where it has none, and how many there are; both (P,)."""
    values = values.double()
    row, valid = _rows(prompts), ~values.isnan()
    empty = torch.zeros(int(row.max()) + 1, dtype=torch.float64)
    count = empty.index_add(0, row, valid.double())
    total = empty.index_add(0, row, torch.where(valid, values, 0))
    return total / torch.where(count > 0, count, torch.nan), count


def pooled_std(values: Tensor, prompts: Tensor) -> float:
    """Root of the mean squared distance from the prompt's mean; over all images where no prompt has two."""
    means, count = by_prompt(values, prompts)
    if not (count > 1).any():
        known = values.double()[~values.isnan()]
        return float(known.std(correction=0)) if len(known) > 1 else math.nan
    row = _rows(prompts)
    centred = (values.double() - means[row])[count[row] > 1]
    return float(centred.square().nanmean().sqrt())


def mean_change(now: Tensor, base: Tensor, prompts: Tensor) -> Gain:
    """Mean of now - base, paired image by image, with the standard error over prompts (0 for a single prompt)."""
    means, count = by_prompt(now.double() - base.double(), prompts)
    means, count = means[count > 0], count[count > 0]
    if not len(means):
        return Gain(math.nan, math.nan)
    value = float((means * count).sum() / count.sum())
    spread = float(means.std()) if len(means) > 1 else 0.0
    return Gain(value, spread / math.sqrt(len(means)))


def standardised_gain(now: Tensor, base: Tensor, prompts: Tensor) -> Gain:
    """The mean change in units of the base model's spread within a prompt; NaN where the base has none."""
    spread, change = pooled_std(base, prompts), mean_change(now, base, prompts)
    return Gain(change.value / spread, change.se / spread) if spread > 0 else Gain(math.nan, math.nan)


def panel_gain(now: Mapping[str, Tensor], base: Mapping[str, Tensor], prompts: Tensor) -> Gain:
    """Mean of the members' standardised gains; its error is that of the mean member, prompt by prompt."""
    joint = panel_moves(now, base, prompts)
    still = torch.zeros_like(joint)
    each = [mean_change(_moves(now[name], base[name], prompts), still, prompts).value for name in base]  # (K,)
    return Gain(float(torch.tensor(each).nanmean()), mean_change(joint, still, prompts).se)


def panel_moves(now: Mapping[str, Tensor], base: Mapping[str, Tensor], prompts: Tensor) -> Tensor:
    """For every image the mean of its members' changes, each in units of the base model's spread; NaN without any."""
    moved = [_moves(now[name], base[name], prompts) for name in base]
    return torch.stack(moved).nanmean(0) if moved else torch.full(prompts.shape, math.nan, dtype=torch.float64)


def hacking_gap(proxy_gain: float, gold_gain: float) -> float:
    """What the proxy gained and the held-out rewards did not."""
    return proxy_gain - gold_gain


def gap_interval(
    proxy: tuple[Tensor, Tensor],
    gold: Sequence[tuple[Tensor, Tensor]],
    prompts: Tensor,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """The hacking gap with a bootstrap over prompts; each reward is (now, base). None where nothing can be compared."""
    gaps = _moves(*proxy, prompts) - torch.stack([_moves(*member, prompts) for member in gold]).nanmean(0)
    means, count = by_prompt(gaps, prompts)
    kept = count > 0
    if not kept.any():
        return None
    return bootstrap(means[kept].tolist(), weights=count[kept].tolist(), draws=draws, seed=seed)


def transfer(proxy_gain: float, gold_gain: float) -> float:
    """The share of the proxy's gain that held-out rewards see; NaN until the proxy has gained anything."""
    return gold_gain / proxy_gain if proxy_gain > LEAST_PROXY_GAIN else math.nan


def path_kl(squared: Tensor, noise: Tensor) -> float:
    """Mean over trajectories of the sum over steps of |mu - mu_base|^2 / (2 nu^2); squared (N, T), noise (T,)."""
    return float((squared.double() / (2 * noise.double().square())).sum(-1).mean())


def frontier_auc(kl: Sequence[float], gain: Sequence[float], ceiling: float) -> float:
    """Mean over budgets in [0, ceiling] of the best gain that a checkpoint within the budget reached."""
    if not ceiling > 0:
        raise ConfigError(f"ceiling is {ceiling}, but a frontier needs a KL budget above 0.")
    points = sorted((k, g) for k, g in zip(kl, gain, strict=True) if k <= ceiling and not math.isnan(g))
    area, best, at = 0.0, 0.0, 0.0
    for k, g in points:
        area, best, at = area + best * (k - at), max(best, g), k
    return (area + best * (ceiling - at)) / ceiling


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area that points (gain, diversity ratio) dominate above (0, 0)."""
    area, height = 0.0, 0.0
    for gain, ratio in sorted(points, reverse=True):
        if gain > 0 and ratio > height:
            area, height = area + gain * (ratio - height), ratio
    return area


def smooth(series: Sequence[float], weight: float = 0.5) -> list[float]:
    """Exponential mean in which the newest value weighs 1 - `weight`; a missing value repeats the last mean."""
    told: list[float] = []
    for value in series:
        last = told[-1] if told else math.nan
        known = value if math.isnan(last) else weight * last + (1 - weight) * value
        told.append(last if math.isnan(value) else known)
    return told


@dataclass(frozen=True)
class TurnOver:
    """Where held-out reward peaked, what was lost since and what the proxy gained meanwhile."""

    index: int
    loss: float
    proxy_since: float


def turn_over(proxy: Sequence[float], gold: Sequence[float], weight: float = 0.5) -> TurnOver:
    """The highest point of the smoothed held-out gain, and how far past it the run went."""
    level = smooth(gold, weight)
    if not any(g == g for g in level):
        raise ConfigError("the held-out reward is NaN at every evaluation, so it has no highest point.")
    peak = max((g, -k) for k, g in enumerate(level) if g == g)
    return TurnOver(-peak[1], peak[0] - level[-1], proxy[-1] - proxy[-peak[1]])


def of_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the evaluations of a run, as metrics.jsonl has them, say of over-optimisation; without a panel nothing.

    `turn_over`: the step of the highest held-out gain, what was lost since and what the proxy gained meanwhile;
    `transfer` and `hacking_gap` of the last evaluation; `frontier`: the mean held-out gain within KL budgets up to the
    run's own `kl`; `hypervolume`: the area of held-out gain by variety that its checkpoints reach.
    """
    judged = [row for row in rows if _number(row, "heldout_gain") == _number(row, "heldout_gain")]
    if not judged:
        return {}
    proxy, gold, kl = ([_number(row, name) for row in judged] for name in ("proxy_gain", "heldout_gain", "kl_base"))
    last, peak = judged[-1], turn_over(proxy, gold)
    gap = {"mean": last.get("hacking_gap"), "lo": last.get("hacking_gap_lo"), "hi": last.get("hacking_gap_hi")}
    since = peak.proxy_since if math.isfinite(peak.proxy_since) else None
    told: dict[str, Any] = {
        "step": last["step"],
        "turn_over": {"step": judged[peak.index]["step"], "loss": peak.loss, "proxy_since": since},
        "transfer": last.get("transfer"),
        "hacking_gap": gap,
    }
    far = max((k for k in kl if k == k), default=0.0)
    if far > 0:  # a KL that is not known lies within no budget
        told["frontier"] = {"gain": frontier_auc(kl, gold, far), "kl": far}
    varied = [(g, ratio) for row, g in zip(judged, gold, strict=True) if (ratio := _number(row, "diversity")) == ratio]
    if varied:
        told["hypervolume"] = hypervolume(varied)
    return told


@dataclass(frozen=True)
class Gao:
    """Gold reward against d = sqrt(KL): d (alpha - beta ln d) for RL, d (alpha - beta d) for best-of-n."""

    alpha: float
    beta: float
    form: Form = "rl"

    def __call__(self, d: float) -> float:
        return float(_gao_columns(torch.tensor([d], dtype=torch.float64), self.form)[0] @ self._weights)

    @property
    def peak(self) -> float:
        """The d of the highest gold reward; infinite where nothing bends the curve down."""
        if self.beta <= 0:
            return math.inf
        exponent = self.alpha / self.beta
        if self.form == "best_of_n":
            return max(exponent / 2, 0.0)
        return math.exp(exponent - 1) if exponent < 700 else math.inf

    @property
    def _weights(self) -> Tensor:
        return torch.tensor([self.alpha, self.beta], dtype=torch.float64)


def fit_gao(kl: Sequence[float], gold: Sequence[float], form: Form = "rl") -> Gao:
    """Least squares for (alpha, beta) over checkpoints or values of n."""
    d = torch.tensor(kl, dtype=torch.float64).sqrt()
    values = torch.tensor(gold, dtype=torch.float64)
    known = ~values.isnan() & (d > 0)
    if len(set(d[known].tolist())) < 2:
        raise ConfigError(f"a fit of alpha and beta needs two different KL values above 0, but got {list(kl)}.")
    alpha, beta = torch.linalg.lstsq(_gao_columns(d[known], form), values[known, None]).solution[:, 0].tolist()
    return Gao(alpha, beta, form)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of the pairs that are both valid, ties at their mean rank; NaN where one is constant."""
    valid = ~(a.isnan() | b.isnan())
    x, y = _ranks(a[valid]), _ranks(b[valid])
    if len(x) < 2 or not (x != 0).any() or not (y != 0).any():
        return math.nan
    return float((x @ y) / (x.norm() * y.norm()))


def spearman_within(a: Tensor, b: Tensor, prompts: Tensor) -> Gain:
    """Mean over prompts of the rank correlation of their images, with its standard error."""
    row = _rows(prompts)
    found = [spearman(a[row == p], b[row == p]) for p in range(int(row.max()) + 1)]
    known = torch.tensor([rho for rho in found if rho == rho], dtype=torch.float64)
    if not len(known):
        return Gain(math.nan, math.nan)
    return Gain(float(known.mean()), float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else 0.0)


def _rows(prompts: Tensor) -> Tensor:
    """The place of every image's prompt among the different prompts in order, (N,)."""
    return torch.unique(prompts, return_inverse=True)[1]  # type: ignore[no-any-return]


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else float(value)


def _moves(now: Tensor, base: Tensor, prompts: Tensor) -> Tensor:
    spread = pooled_std(base, prompts)
    return (now.double() - base.double()) / (spread if spread > 0 else math.nan)


def _gao_columns(d: Tensor, form: Form) -> Tensor:
    bend = torch.xlogy(d, d) if form == "rl" else d.square()
    return torch.stack([d, -bend], -1)  # (N, 2)


def _ranks(values: Tensor) -> Tensor:
    """Ranks around 0, ties at their mean."""
    over = values.unsqueeze(-1) - values
    return over.sign().double().sum(-1) / 2
