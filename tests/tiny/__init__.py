"""Tiny pipelines of the real diffusers and transformers classes: seeded random weights, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

from diffusers import DiffusionPipeline

from . import dits, unets, videos
from .family import Family

FAMILIES: dict[str, Family] = {family.name: family for file in (unets, dits, videos) for family in file.families()}


def build(name: str) -> DiffusionPipeline:
    """A fresh tiny pipeline of that family; the same bits every time."""
    return FAMILIES[name].build()


def call(name: str, batch: int = 1) -> dict[str, Any]:
    """Fresh keyword arguments to run that family on `batch` cases."""
    return FAMILIES[name].call(batch)
