"""Fine-tuning: one loop on Accelerate, an objective per paper, and a watch over what the reward does to the model.

from diffalign.train import TrainConfig, train
train(pipe, TrainConfig(reward={"clip": 1.0}, prompts="my_prompts.txt"), out="out/mine")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.train.adapters import AdapterConfig
    from diffalign.train.advantage_config import AdvantageConfig
    from diffalign.train.settings import EvaluateConfig, OptimConfig, TrainConfig
    from diffalign.train.start import train
    from diffalign.train.watch import WatchConfig

_HOMES = {
    "adapters": ("AdapterConfig",),
    "advantage_config": ("AdvantageConfig",),
    "settings": ("EvaluateConfig", "OptimConfig", "TrainConfig"),
    "start": ("train",),
    "watch": ("WatchConfig",),
}

__all__ = [
    "AdapterConfig",
    "AdvantageConfig",
    "EvaluateConfig",
    "OptimConfig",
    "TrainConfig",
    "WatchConfig",
    "train",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"diffalign.train.{home}"), name)
    raise AttributeError(f"module 'diffalign.train' has no attribute '{name}'")
