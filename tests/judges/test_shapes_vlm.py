"""The embedded judge, for real: every protocol runs with it, and right pictures are rated above wrong ones."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import zoo
from diffalign.cases import Case
from diffalign.judges.finding import find_judge
from diffalign.scoring import Score, make_reward, score
from diffalign.world.edit_sets import picture
from diffalign.world.grammar import say
from diffalign.world.rendering import render
from diffalign.zoo.lessons import Pupil, soft
from diffalign.zoo.vlm_measure import attempts, measure_answers, measure_edits, questions, spearman

PICTURE_PROTOCOLS = (
    "vqascore",
    "point_score",
    "unifiedreward",
    {"unifiedreward": {"form": "point"}},
    "rubric",
    {"rubric": {"ask": "each"}},
    "key_facts",
    {"principle": {"principle": "the picture matches its words"}},
)


def rated(spec: Any, media: Tensor, cases: list[Case]) -> Score:
    return score(make_reward(spec), media, cases, all_invalid=True)


def pictures(n: int, seed: int) -> tuple[Tensor, list[Case], list[float]]:
    pupil, media, cases, truth = Pupil(random.Random(f"test {seed}"), strong=0.0), [], [], []
    for k in range(n):
        clauses, scene = pupil.asked()
        media.append(render(scene))
        cases.append(Case(prompt=say(clauses), seed=k))
        truth.append(soft(clauses, scene))
    return torch.stack(media), cases, truth


@pytest.mark.parametrize("spec", PICTURE_PROTOCOLS, ids=str)
def test_every_protocol_for_pictures_reads_its_replies_and_agrees_with_the_truth(spec: Any) -> None:
    media, cases, truth = pictures(24, 0)
    found = rated(spec, media, cases)
    assert float(found.valid.float().mean()) >= 0.75
    sound = [(total, true) for total, true in zip(found.total.tolist(), truth, strict=True) if math.isfinite(total)]
    assert spearman(*zip(*sound, strict=True)) > 0.2


@pytest.mark.parametrize("name", ["editscore", pytest.param("edit_r1", marks=pytest.mark.slow)])
def test_both_edit_protocols_read_their_replies_and_agree_with_the_truth(name: str) -> None:
    tried = attempts(25, 7)
    found = rated(name, torch.stack([one.media for one in tried]), [one.case for one in tried])
    assert float(found.valid.float().mean()) >= 0.9
    sound = [(t, one.quality) for t, one in zip(found.total.tolist(), tried, strict=True) if math.isfinite(t)]
    assert spearman(*zip(*sound, strict=True)) > 0.4


def test_a_pair_is_judged_the_same_whichever_comes_first() -> None:
    media, cases, _ = pictures(8, 1)
    there = [
        Case(prompt=case.prompt, reference=picture(image)) for case, image in zip(cases, media.flip(0), strict=True)
    ]
    back = [Case(prompt=case.prompt, reference=picture(image)) for case, image in zip(cases, media, strict=True)]
    one, other = rated("pairwise", media, there), rated("pairwise", media.flip(0), back)
    assert torch.allclose(one.total + other.total, torch.ones(8))


def test_yes_or_no_answers_are_as_good_as_the_card_says() -> None:
    told = zoo.card("shapes-vlm")["measured"]["yes_no"]
    assert told["strict"] >= 0.9
    found = measure_answers(zoo.folder("shapes-vlm"), seed=11, n=200)
    assert found["hi"] >= told["lo"]


def test_questions_are_balanced_and_half_of_them_about_whole_captions() -> None:
    asked = questions(80, 0)
    assert sum(one.truth for one in asked) == 40
    assert sum(one.kind == "caption" for one in asked) == 40


def test_replies_about_edits_can_be_read() -> None:
    found = measure_edits("shapes-vlm", seed=12, n=40)
    assert found["parsed"]["mean"] >= 0.95
    assert found["spearman"]["hi"] >= 0.6


def test_the_model_ships_small_and_without_pickles() -> None:
    files = [path for path in zoo.folder("shapes-vlm").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_all_rewards_share_one_judge() -> None:
    assert find_judge("shapes-vlm") is make_reward("vqascore").backend  # type: ignore[attr-defined]
