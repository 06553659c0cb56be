"""diffalign: make the diffusion model you already use follow your intent better, measured, without forking it.

Names below load on first use, so that `import diffalign` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.aligning import align
    from diffalign.budget import Budget, Limits
    from diffalign.cases import Case, read_cases
    from diffalign.conformance import Conformance, check
    from diffalign.drive import Driver, Trajectory, grad_call
    from diffalign.errors import DiffalignError
    from diffalign.registry import register_pipeline, register_reward
    from diffalign.report import Report
    from diffalign.scoring import Reward, Score, make_reward, score
    from diffalign.trees import read_tree, save_tree

__version__ = "0.1.0"

_HOMES = {
    "aligning": ("align",),
    "budget": ("Budget", "Limits"),
    "cases": ("Case", "read_cases"),
    "conformance": ("Conformance", "check"),
    "drive": ("Driver", "Trajectory", "grad_call"),
    "errors": ("DiffalignError",),
    "registry": ("register_pipeline", "register_reward"),
    "report": ("Report",),
    "scoring": ("Reward", "Score", "make_reward", "score"),
    "trees": ("read_tree", "save_tree"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Budget",
    "Case",
    "Conformance",
    "DiffalignError",
    "Driver",
    "Limits",
    "Report",
    "Reward",
    "Score",
    "Trajectory",
    "align",
    "check",
    "grad_call",
    "make_reward",
    "read_cases",
    "read_tree",
    "register_pipeline",
    "register_reward",
    "save_tree",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"diffalign has no '{name}'. It has: {', '.join(__all__)}.")
    return getattr(import_module(f"diffalign.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
