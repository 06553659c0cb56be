"""The shapes world: scenes, captions, an exact renderer, an exact verifier and prompt sets.

from diffalign import world
verdicts = world.verify(images, world.prompts("heldout"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.world.compose import held_out, sample_clauses, sample_scene
    from diffalign.world.edit_sets import OUTCOMES, EditTriple, attempt, edit_case, sample_edit, verify_edits
    from diffalign.world.edits import Edit, EditVerdict, judge_edit, parse_edit, say_edit
    from diffalign.world.grammar import Clauses, Relation, Want, caption, parse, say
    from diffalign.world.promptsets import prompts, sample_case
    from diffalign.world.rendering import render, render_many
    from diffalign.world.scenes import Scene, Shape
    from diffalign.world.verifier import Verdict, verify

_HOMES = {
    "compose": ("held_out", "sample_clauses", "sample_scene"),
    "edit_sets": ("OUTCOMES", "EditTriple", "attempt", "edit_case", "sample_edit", "verify_edits"),
    "edits": ("Edit", "EditVerdict", "judge_edit", "parse_edit", "say_edit"),
    "grammar": ("Clauses", "Relation", "Want", "caption", "parse", "say"),
    "promptsets": ("prompts", "sample_case"),
    "rendering": ("render", "render_many"),
    "scenes": ("Scene", "Shape"),
    "verifier": ("Verdict", "verify"),
}

__all__ = [
    "OUTCOMES",
    "Clauses",
    "Edit",
    "EditTriple",
    "EditVerdict",
    "Relation",
    "Scene",
    "Shape",
    "Verdict",
    "Want",
    "attempt",
    "caption",
    "edit_case",
    "held_out",
    "judge_edit",
    "parse",
    "parse_edit",
    "prompts",
    "render",
    "render_many",
    "sample_case",
    "sample_clauses",
    "sample_edit",
    "sample_scene",
    "say",
    "say_edit",
    "verify",
    "verify_edits",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"diffalign.world.{home}"), name)
    raise AttributeError(f"module 'diffalign.world' has no attribute '{name}'")
