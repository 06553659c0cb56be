"""The verifier reads pixels alone and agrees with the truth it never sees.

Agreement on 5,000 random scenes is measured by the slow test; its floors are the aims, the figures are in its table.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffalign import world
from diffalign.cases import Case
from diffalign.world.grammar import TAGS, Clauses, Relation, Want, say
from diffalign.world.scenes import Scene, Shape, relations_between
from diffalign.world.see import Sight
from diffalign.world.verifier import judge


def scenes(count: int, seed: int) -> tuple[list[Case], Tensor]:
    rng = random.Random(seed)
    kinds = (*TAGS, "hard")
    asked = [world.sample_clauses(kinds[i % len(kinds)], rng) for i in range(count)]
    return [Case(prompt=say(c)) for c in asked], world.render_many([world.sample_scene(c, rng) for c in asked])


def agreement(cases: list[Case], media: Tensor) -> float:
    return sum(v.strict for v in world.verify(media, cases)) / len(cases)


def blurred(media: Tensor) -> Tensor:
    axis = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * 0.7**2))
    kernel = (axis[:, None] * axis[None]) / axis.sum() ** 2
    padded = functional.pad(media, (2, 2, 2, 2), mode="replicate")
    return functional.conv2d(padded, kernel.expand(3, 1, 5, 5), groups=3)


def noisy(media: Tensor) -> Tensor:
    return (media + 0.05 * torch.randn(media.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def compressed(media: Tensor) -> Tensor:
    found = []
    for image in media:
        buffer = io.BytesIO()
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        found.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255)
    return torch.stack(found)


def twice_as_large(media: Tensor) -> Tensor:
    return functional.interpolate(media, scale_factor=2, mode="bilinear")


WEAR: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "as rendered": (lambda media: media, 0.995),
    "blur of 0.7 pixels": (blurred, 0.99),
    "noise of 0.05": (noisy, 0.99),
    "JPEG at quality 85": (compressed, 0.9),
    "twice as large": (twice_as_large, 0.99),
}


@pytest.mark.parametrize("wear", WEAR)
def test_verifier_passes_rendered_scenes_that_are_worn(wear: str) -> None:
    change, floor = WEAR[wear]
    cases, media = scenes(98, seed=3)
    assert agreement(cases, change(media)) >= floor


def test_verifier_agrees_with_the_truth_on_500_random_scenes() -> None:
    assert agreement(*scenes(500, seed=5)) >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("wear", WEAR)
def test_verifier_agrees_with_the_truth_on_5000_random_scenes(wear: str) -> None:
    change, floor = WEAR[wear]
    cases, media = scenes(5000, seed=11)
    assert agreement(cases, change(media)) >= floor


def test_verifier_fails_every_scene_under_a_prompt_with_one_word_changed() -> None:
    from diffalign.zoo.clip import spoil

    cases, media = scenes(140, seed=8)
    rng = random.Random(0)
    wrong = [Case(prompt=say(spoil(world.parse(case.prompt) or Clauses(()), rng))) for case in cases]
    assert agreement(wrong, media) <= 0.02


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    kind=st.sampled_from(["noise", "uniform", "nan", "inf", "outside"]),
    seed=st.integers(0, 100),
)
def test_verifier_never_crashes_on_garbage(height: int, width: int, kind: str, seed: int) -> None:
    media = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    if kind == "uniform":
        media = media[..., :1, :1].expand(1, 3, height, width).clone()
    elif kind in ("nan", "inf"):
        media[..., 0, 0] = float(kind)
    elif kind == "outside":
        media = media * 1e6 - 5e5
    verdict = world.verify(media, [Case(prompt="two red circles")])[0]
    assert not verdict.strict
    assert verdict.reason
    assert 0 <= verdict.soft <= 1


def test_a_prompt_outside_the_grammar_does_not_apply() -> None:
    verdict = world.verify(torch.rand(1, 3, 64, 64), [Case(prompt="an astronaut riding a horse")])[0]
    assert not verdict.applies
    assert not verdict.strict


def square(colour: str, x: float, y: float, radius: float = 6.0) -> Shape:
    return Shape("square", colour, x, y, radius)


def test_soft_terms_are_clipped_where_the_plain_formula_turns_negative() -> None:
    five = Sight(tuple(square("red", 8.0 + 12 * k, 20.0, 4.0) for k in range(5)))
    verdict = judge(five, Clauses((Want(2, "square", "red"),)))
    assert verdict.terms == {"count:0": 0.0, "colour:0": 0.0, "nothing else": 1.0}
    assert verdict.soft == pytest.approx(1 / 3)


def test_wrong_colour_loses_one_clause_and_not_the_count() -> None:
    sight = Sight((square("red", 15, 30), square("green", 45, 30)))
    verdict = judge(sight, Clauses((Want(1, "square", "red"), Want(1, "square", "blue"))))
    assert verdict.terms == {"count:0": 1, "colour:0": 1, "count:1": 1, "colour:1": 0, "nothing else": 1}


def test_an_object_nobody_asked_for_is_a_fail() -> None:
    sight = Sight((square("red", 15, 30), Shape("circle", "red", 45, 30, 6)))
    verdict = judge(sight, Clauses((Want(1, "square", "red"),)))
    assert not verdict.strict
    assert verdict.terms["nothing else"] == 0


def test_relation_follows_the_rule_of_geneval() -> None:
    # boxes of width and height 10 at a distance of 30: (-30 + 2) / 30 = -0.933 is left; the diagonal gives -0.66 twice
    half = 5 / square("red", 0, 0, 1.0).half_extent[0]
    a, right, corner = square("red", 5, 5, half), square("red", 35, 5, half), square("red", 35, 35, half)
    assert relations_between(a, right) == {"left of"}
    assert relations_between(a, corner) == {"left of", "above"}
    assert relations_between(a, a) == set()


def test_a_missing_object_fails_its_relation() -> None:
    asked = Clauses((Want(1, "square", "red"), Want(1, "circle", "blue")), (Relation(0, "left of", 1),))
    assert judge(Sight((square("red", 15, 30),)), asked).terms["relation:0"] == 0


def test_an_empty_scene_is_read_as_empty() -> None:
    verdict = world.verify(world.render(Scene(()))[None], [Case(prompt="a red circle")])[0]
    assert "saw no shape" in verdict.reason
