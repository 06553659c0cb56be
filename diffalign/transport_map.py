"""A learned map from one cloud of embeddings to another: neural optimal transport by the strong dual.

Papers: "Neural Optimal Transport", Korotin et al., 2023 (arXiv 2201.12220); PISCES (arXiv 2602.01624), which maps the
text embeddings of a model onto those of its videos. A map T and a potential f play sup_f inf_T mean f(x) +
mean[c(y, T(y)) - f(T(y))] with the squared distance as c; neither sees which text belongs to which video.

Where we differ: sizes, rates and the number of steps are not printed and are ours. The map is y plus what a network of
three layers gives, so that it begins as the identity. A map whose images have lost their variance is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import atomic, weights
from diffalign.errors import ConfigError, ModelError

CARD, FILE = "map.json", "map.safetensors"
COLLAPSED = 0.05  # share of the target's variance below which a map has lost its images' variety


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """How the map is learnt."""

    width: int = 512  # of both networks' layers
    steps: int = 2000  # updates of the potential
    map_steps: int = 10  # updates of the map for each of those
    batch: int = 512
    learning_rate: float = 1e-4
    every: int = 100  # steps between two looks

    def __post_init__(self) -> None:
        if min(self.width, self.steps, self.map_steps, self.every) < 1 or self.batch < 2 or not self.learning_rate > 0:
            raise ConfigError(
                f"a map has width {self.width}, steps {self.steps}, map_steps {self.map_steps}, batch {self.batch}, "
                f"every {self.every} and learning_rate {self.learning_rate}: at least 1, a batch of 2, a rate above 0."
            )


@dataclass(frozen=True, kw_only=True)
class MapCard:
    """What a map belongs to."""

    encoder: str  # whose embeddings it maps
    normalised: bool  # whether they have length 1
    data: str  # digest of what it was fitted to
    size: int
    width: int
    history: list[dict[str, float]] = field(default_factory=list)  # of each look: cost, gap, cosine, variance


class NeuralMap(nn.Module):
    """y -> y + three layers of it."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.net = _layers(size, width, size)
        last = self.net[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = rows + self.net(rows)
        return found


def _layers(size: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, width),
        nn.LayerNorm(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.ReLU(),
        nn.Linear(width, out),
    )


def fit(
    source: Tensor,
    target: Tensor,
    config: MapConfig = MapConfig(),
    *,
    encoder: str,
    normalised: bool = False,
    pairs: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    say: Callable[[dict[str, float]], None] = lambda row: None,
) -> tuple[NeuralMap, MapCard]:
    """A map from rows (S, D) to the law of rows (T, D), which are not paired; `pairs` are held out, to look at.

    ModelError where the map has collapsed to few points.
    """
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1] or min(len(source), len(target)) < 2:
        raise ConfigError(f"rows of the shapes {tuple(source.shape)} and {tuple(target.shape)} are no two clouds.")
    if not bool(source.isfinite().all() and target.isfinite().all()):
        raise ConfigError("some embeddings are not finite, so no map can be fitted to them.")
    one, two, size = source.float(), target.float(), source.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made, potential = NeuralMap(size, config.width), _layers(size, config.width, 1)
    rate = config.learning_rate
    maps, duals = (torch.optim.Adam(each.parameters(), lr=rate, betas=(0.5, 0.9)) for each in (made, potential))
    history: list[dict[str, float]] = []
    for step in range(config.steps):
        draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for _ in range(config.map_steps):
            rows = _some(one, config.batch, draws)
            images = made(rows)
            loss = ((rows - images).square().sum(1) - potential(images)[:, 0]).mean()
            _update(maps, loss)
        with torch.no_grad():
            images = made(_some(one, config.batch, draws))
        _update(duals, potential(images).mean() - potential(_some(two, config.batch, draws)).mean())
        if (step + 1) % config.every == 0 or step + 1 == config.steps:
            history.append({"step": float(step + 1), **look(made, potential, one, two, pairs)})
            say(history[-1])
    if history[-1]["variance"] < COLLAPSED:
        raise ModelError(
            f"the map's images have {history[-1]['variance']:.1%} of the target's variance: it has collapsed. Lower "
            "learning_rate, or give more rows."
        )
    told = hashlib.sha256(one.numpy().tobytes() + two.numpy().tobytes()).hexdigest()[:16]
    card = MapCard(encoder=encoder, normalised=normalised, data=told, size=size, width=config.width, history=history)
    return made.requires_grad_(False).eval(), card


@torch.no_grad()
def look(
    made: nn.Module, potential: nn.Module, source: Tensor, target: Tensor, pairs: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    """How the game stands: cost of the map, gap of the potential, share of the target's variance; cosines of pairs."""
    images = made(source)
    found = {
        "cost": float((source - images).square().sum(1).mean()),
        "gap": float(potential(target).mean() - potential(images).mean()),
        "variance": float(images.var(0).sum() / target.var(0).sum().clamp(min=1e-12)),
    }
    if pairs is not None:
        texts, videos = pairs[0].float(), pairs[1].float()
        found["cosine"] = float(torch.cosine_similarity(made(texts), videos, dim=1).mean())
        found["plain_cosine"] = float(torch.cosine_similarity(texts, videos, dim=1).mean())
    return found


def _some(rows: Tensor, count: int, draws: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (count,), generator=draws)]


def _update(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def save(folder: str | Path, made: NeuralMap, card: MapCard) -> Path:
    """Write a map and what it belongs to."""
    from safetensors.torch import save_file

    place = atomic.require_folder(folder)
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, place / FILE)
    atomic.write_json(place / CARD, asdict(card))
    return place


def load(folder: str | Path, *, encoder: str, normalised: bool = False) -> NeuralMap:
    """The map of a folder; ModelError where it belongs to other embeddings than these."""
    place = Path(folder)
    told: dict[str, Any] = weights.read_settings(place / CARD)
    try:
        card = MapCard(**told)
    except TypeError as e:
        raise ModelError(f"'{place / CARD}' is no card of a map ({e}). Fit it again.") from e
    if card.encoder != encoder:
        raise ModelError(
            f"the map in '{folder}' is of embeddings by '{card.encoder}', and these are by '{encoder}'. Fit another."
        )
    if card.normalised != normalised:
        kinds = {True: "of length 1", False: "of any length"}
        raise ModelError(
            f"the map in '{folder}' takes embeddings {kinds[card.normalised]}, and these are {kinds[normalised]}."
        )
    made = NeuralMap(card.size, card.width)
    weights.fit(made, weights.read(place / FILE), f"'{folder}'")
    return made.requires_grad_(False).eval()
