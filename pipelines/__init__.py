"""Drop-in pipelines: each wraps any stock diffusers pipeline and is called the same way, plus `reward=`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if not __name__.startswith("diffalign."):
    raise ImportError("import diffalign.pipelines; a bare `import pipelines` would load a second copy of every class.")

if TYPE_CHECKING:
    from .best_of_n import BestOfNPipeline
    from .dense import DensePipeline
    from .reno import ReNOPipeline
    from .search import SearchPipeline
    from .smc import SMCPipeline
    from .tree import TreePipeline

_FILES = {
    "BestOfNPipeline": "best_of_n",
    "DensePipeline": "dense",
    "ReNOPipeline": "reno",
    "SMCPipeline": "smc",
    "SearchPipeline": "search",
    "TreePipeline": "tree",
}

__all__ = ["BestOfNPipeline", "DensePipeline", "ReNOPipeline", "SMCPipeline", "SearchPipeline", "TreePipeline"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"diffalign.pipelines has no '{name}'. It has: {', '.join(sorted(_FILES))}.")
    return getattr(import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
