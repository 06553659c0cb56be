"""How fast scores come: a batch over one image at a time, and a pass out of the cache over a fresh one.

Ratios of times from one run, taken in turn, with a CLIP of realistic size and random weights. Prompts are encoded once
beforehand in both, so the image tower is what counts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffalign import scoring
from diffalign.bench.seam import alternated, told
from diffalign.cases import Case
from diffalign.errors import ConfigError, UnknownName


@dataclass(frozen=True, kw_only=True)
class ScoringBench:
    """The scorer and how much is timed."""

    architecture: str = "ViT-B-32"  # of open_clip, with random weights
    images: int = 16  # in one batch
    side: int = 512  # pixels, as generated images have
    repeats: int = 5  # timed rounds; the median of their ratios counts
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "side", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench.{name} is {getattr(self, name)}, but it must be at least 1.")


def measure(config: ScoringBench | None = None, *, on_step: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Images per second of a batch over one at a time, and of the cache over a fresh pass."""
    config = config or ScoringBench()
    draw = torch.Generator().manual_seed(config.seed)
    levels = torch.randint(0, 256, (config.images, 3, config.side, config.side), generator=draw)
    media, cases = levels.float() / 255, [Case(prompt=f"picture {k}") for k in range(config.images)]
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        on_step(f"making a {config.architecture}")
        reward = scoring.make_reward({"clip": {"model": str(random_clip(config, Path(place)))}})
        cache = scoring.ScoreCache(Path(place) / "scores.sqlite")
        scoring.score(reward, media, cases, cache=cache)

        def single() -> None:
            for k in range(config.images):
                scoring.score(reward, media[k : k + 1], cases[k : k + 1])

        runs = (
            single,
            lambda: scoring.score(reward, media, cases),
            lambda: scoring.score(reward, media, cases, cache=cache),
        )
        times = alternated(runs, config.repeats, tell=told(on_step, "scoring"))
    batched, cached = [one / many for one, many, _ in times], [many / kept for _, many, kept in times]
    return {
        "architecture": config.architecture,
        "threads": torch.get_num_threads(),
        "images": config.images,
        "side": config.side,
        "batch_ratio": median(batched),
        "batch_ratio_range": [min(batched), max(batched)],
        "cache_ratio": median(cached),
        "cache_ratio_range": [min(cached), max(cached)],
        "milliseconds_per_image": 1000 * median(many for _, many, _ in times) / config.images,
    }


def random_clip(config: ScoringBench, place: Path) -> Path:
    """A folder that open_clip reads, with weights drawn at random."""
    import open_clip
    from safetensors.torch import save_file

    if config.architecture not in open_clip.list_models():
        raise UnknownName.among(
            "architecture", config.architecture, open_clip.list_models(), "diffalign bench scoring --help"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = open_clip.create_model(config.architecture, None, load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, place / "open_clip_model.safetensors")
    told_of = {"model_cfg": open_clip.get_model_config(config.architecture), "preprocess_cfg": {}}
    (place / "open_clip_config.json").write_text(json.dumps(told_of), encoding="utf-8")
    return place
