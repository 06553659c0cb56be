"""VQAScore: CLIP-FlanT5 at a tiny width, and judges that say what a test tells them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward, NotDifferentiable
from diffalign.judges.asking import Decision
from diffalign.judges.local import LocalJudge
from diffalign.judges.wording import SHOWS
from diffalign.rewards.vqascore import VQAScore
from diffalign.scoring import Score, ScoreCache, require_gradient, score
from tests.judges import tiny_judges
from tests.rewards import clip_t5
from tests.rewards.clip_t5 import media_of
from tests.rewards.scripted import Scripted, level, plain

ASKED = 'USER: {picture}\nDoes it show "{prompt}"? ASSISTANT: '
PROMPTS = ["two red circles", "a blue square", "", "a green triangle above a red circle"]
HOSTILE = [
    "</s>",
    "{prompt}",
    "{picture}",
    "<image>",
    "{0} {question}",
    "<pad>" * 9,
    "\U0001f600" * 50,
    "x" * 9000,
    "\x00",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_t5.write(tmp_path_factory.mktemp("vqascore"), clip_t5.published(clip_t5.stock()))


def t5(folder: Path, **options: Any) -> VQAScore:
    told = {"judge": {"model": str(folder), "dtype": "float32"}, "question": ASKED, "path": "tensor"}
    return VQAScore("t5", **{**told, **options})


@pytest.fixture(scope="module")
def reward(folder: Path) -> VQAScore:
    return t5(folder)


def rated(reward: VQAScore, media: Tensor, prompts: Sequence[str]) -> Score:
    return score(reward, media, [Case(prompt=prompt) for prompt in prompts])


def by_level(decision: Decision) -> tuple[float, ...]:
    """The lighter the picture, the surer; a longer question costs a little."""
    yes = level(decision.images[0]) / (1 + len(decision.text) / 1000)
    return yes, 1 - yes


def test_a_batch_equals_singles_and_a_permutation_permutes(reward: VQAScore) -> None:
    media = media_of(4)
    whole = rated(reward, media, PROMPTS).total
    singles = torch.cat([rated(reward, media[k : k + 1], PROMPTS[k : k + 1]).total for k in range(4)])
    assert torch.allclose(whole, singles, rtol=1e-4)
    order = torch.tensor([3, 1, 0, 2])
    found = rated(reward, media[order], [PROMPTS[int(k)] for k in order]).total
    assert torch.allclose(found, whole[order], rtol=1e-4)
    assert ((whole > 0) & (whole < 1)).all()


def test_the_number_at_once_changes_nothing(folder: Path, reward: VQAScore) -> None:
    media = media_of(4)
    assert torch.allclose(
        rated(t5(folder, micro_batch=1), media, PROMPTS).total, rated(reward, media, PROMPTS).total, rtol=1e-4
    )


@examples(max_examples=4, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_gradient_matches_a_directional_difference_and_reaches_no_weight(reward: VQAScore, seed: int) -> None:
    media = media_of(1, 34, 34, seed).mul(0.5).add(0.25).requires_grad_()

    def surely(media: Tensor) -> Tensor:
        return rated(reward, media, PROMPTS[:1]).total.log().sum()

    (gradient,) = torch.autograd.grad(surely(media), media)
    direction, step = gradient / gradient.norm(), 1e-2
    ends = [float(surely(media.detach() + s * direction)) for s in (step, -step)]
    assert gradient.isfinite().all()
    assert gradient.norm() > 1e-3
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=5e-2)
    assert all(weight.grad is None for weight in reward.tower.parts.parameters())


def test_only_t5_off_the_reference_path_has_a_gradient(folder: Path) -> None:
    assert t5(folder).differentiable
    assert t5(folder, path="auto").differentiable
    with pytest.raises(NotDifferentiable, match="rounds pixels to 8 bits"):
        require_gradient(t5(folder, path="reference"), "noise optimisation")
    with pytest.raises(NotDifferentiable, match="reads what a judge writes"):
        require_gradient(VQAScore(judge=Scripted()), "noise optimisation")


def test_the_matrix_is_every_picture_against_every_text(reward: VQAScore) -> None:
    media = media_of(3)
    found = reward.matrix(media, PROMPTS)
    assert found.shape == (3, 4)
    for k in range(3):
        row = rated(reward, media[k : k + 1].expand(4, -1, -1, -1), PROMPTS).total
        assert torch.allclose(found[k], row, rtol=1e-4)
    judge = Scripted(chooses=by_level)
    chat = VQAScore(judge=judge).matrix(plain(0.2, 0.4, 0.8), ["a", "bbb"])
    assert chat.shape == (3, 2)
    assert len(judge.decisions) == 6
    single = rated(VQAScore(judge=judge), plain(0.4), ["bbb"]).total
    assert float(chat[1, 1]) == pytest.approx(float(single))
    with pytest.raises(ConfigError, match="3 pictures and 0 texts"):
        reward.matrix(media, [])


@pytest.mark.slow
def test_hostile_prompts_are_text_and_do_not_touch_their_neighbours(reward: VQAScore) -> None:
    media = media_of(1).expand(len(HOSTILE) + 1, -1, -1, -1)
    found = rated(reward, media, [*HOSTILE, "a"]).total
    assert found.isfinite().all()
    assert torch.allclose(found[-1:], rated(reward, media[:1], ["a"]).total, rtol=1e-4)
    assert not torch.equal(found[1], found[2])
    judge = Scripted(chooses=by_level)
    rated(VQAScore(judge=judge), plain(*[0.5] * len(HOSTILE)), HOSTILE)
    assert [one.text for one in judge.decisions] == [SHOWS.replace("{prompt}", prompt) for prompt in HOSTILE]


def test_a_picture_that_is_not_finite_is_invalid_alone(reward: VQAScore) -> None:
    media = media_of(3)
    clean = rated(reward, media, PROMPTS[:3]).total
    media[1, 0, 2, 2] = math.nan
    found = rated(reward, media, PROMPTS[:3])
    assert found.valid.tolist() == [True, False, True]
    assert torch.allclose(found.total[[0, 2]], clean[[0, 2]], rtol=1e-4)


def test_our_own_words_come_with_a_warning_and_whole_texts_without(folder: Path) -> None:
    with pytest.warns(UserWarning, match="its scores are not the published ones"):
        plain_words = rated(t5(folder, question=SHOWS), media_of(1), ["a"]).total
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        framed = rated(t5(folder, question='Is it "{prompt}"?'), media_of(1), ["a"]).total
        whole = rated(t5(folder, question='USER: {picture}\nIs it "{prompt}"? ASSISTANT: '), media_of(1), ["a"]).total
    assert torch.equal(framed, whole)
    assert not torch.equal(plain_words, whole)


def test_a_chat_judge_is_asked_one_question_a_row_with_its_picture() -> None:
    judge = Scripted(chooses=by_level)
    found = rated(VQAScore(judge=judge), plain(0.2, 0.8), ["a", "b"])
    assert [level(one.images[0]) for one in judge.decisions] == [0.2, 0.8]
    assert [one.labels for one in judge.decisions] == [("Yes", "No")] * 2
    assert judge.decisions[0].prompt == 'Does the picture show "a"?\nAnswer Yes or No.'
    assert found.total.tolist() == pytest.approx([by_level(one)[0] for one in judge.decisions])
    assert found.total[1] > found.total[0]


@pytest.mark.parametrize("said", [None, (math.nan, math.nan)])
def test_a_judge_that_gives_no_probability_leaves_the_row_invalid(said: tuple[float, ...] | None) -> None:
    reward = VQAScore(judge=Scripted(chooses=lambda d: said if level(d.images[0]) < 0.5 else (0.7, 0.3)))
    found = rated(reward, plain(0.2, 0.8), ["a", "b"])
    assert found.valid.tolist() == [False, True]
    assert reward.judgements[0][1].problem
    with pytest.raises(InvalidReward, match="NaN for all 1 rows"):
        rated(reward, plain(0.2), ["a"])


def test_the_whole_vocabulary_is_asked_for_only_where_a_judge_can_tell() -> None:
    class Whole(Scripted):
        def decide(self, decisions: Sequence[Decision], *, whole: bool = False) -> list[tuple[float, ...] | None]:
            return [(0.3, 0.1) if whole else (0.75, 0.25) for _ in decisions]

    media, asked = plain(0.5), ["a"]
    assert float(rated(VQAScore(judge=Whole()), media, asked).total) == pytest.approx(0.75)
    found = rated(VQAScore(judge=Whole(), probability="vocabulary"), media, asked)
    assert float(found.total) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="'scripted' does not tell the probability of every word"):
        rated(VQAScore(judge=Scripted(), probability="vocabulary"), media, asked)


def test_a_judge_in_this_process_gives_the_share_of_yes_or_its_probability_among_all_words(tmp_path: Path) -> None:
    tiny_judges.folder(tmp_path)
    media, asked = media_of(3), PROMPTS[:3]
    judge = {"model": str(tmp_path), "covered": 0.0}  # random weights seldom mean yes or no
    found = {name: VQAScore(judge=judge, probability=name) for name in ("pair", "vocabulary")}
    pair, whole = (rated(found[name], media, asked).total for name in ("pair", "vocabulary"))
    assert ((whole > 0) & (whole < pair) & (pair < 1)).all()
    decisions = [
        Decision(text=SHOWS.replace("{prompt}", prompt), images=(row,))
        for row, prompt in zip(media, asked, strict=True)
    ]
    told = LocalJudge(str(tmp_path), covered=0.0).decide(decisions)
    assert pair.tolist() == pytest.approx([chances[0] for chances in told if chances], rel=1e-4)
    singles = torch.cat([rated(found["pair"], media[k : k + 1], asked[k : k + 1]).total for k in range(3)])
    assert torch.allclose(pair, singles, rtol=1e-4)


def test_judgements_are_kept_and_logged(folder: Path, tmp_path: Path) -> None:
    reward = VQAScore(judge=Scripted(chooses=by_level), log=str(tmp_path / "chat.jsonl"))
    rated(reward, plain(0.5), ["a"])
    row = json.loads((tmp_path / "chat.jsonl").read_text())
    assert row["valid"]
    assert row["raw"][0].startswith("Yes 0.4")
    own = t5(folder, log=str(tmp_path / "t5.jsonl"))
    total = float(rated(own, media_of(1), ["a"]).total)
    assert json.loads((tmp_path / "t5.jsonl").read_text())["total"] == pytest.approx(total)


def test_scores_are_cached_by_weights_question_and_path(folder: Path, tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "c.sqlite")
    other = 'USER: {picture}\nIs it "{prompt}"?'
    for options in ({}, {}, {"question": other}, {"path": "reference"}):
        score(t5(folder, **options), media_of(1), [Case(prompt="a")], cache=cache)
    assert len(cache) == 3
    for judge in (Scripted(chooses=by_level), Scripted(chooses=by_level, version="2")):
        score(VQAScore(judge=judge), plain(0.5), [Case(prompt="a")], cache=cache)
    assert len(cache) == 5
    assert VQAScore(judge=Scripted(version=None)).version is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"question": "Is it good?"}, r"needs \{prompt\}"),
        ({"question": "{prompt} {picture}"}, r"needs \{prompt\}"),
        ({"question": "{picture} {prompt} {picture}"}, r"needs \{prompt\}"),
        ({"variant": "chat", "question": ASKED}, "for variant: t5"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"judge": {"modle": "x"}}, "takes the hub id or folder of a CLIP-FlanT5"),
        ({"judge": {"dtype": "float32"}}, "takes the hub id or folder of a CLIP-FlanT5"),
        ({"judge": {"model": "x", "dtype": "float16"}}, "T5 overflows in float16"),
        ({"judge": {"model": 3}}, "takes the hub id or folder of a CLIP-FlanT5"),
        ({"judge": Scripted()}, "takes the hub id or folder of a CLIP-FlanT5"),
    ],
)
def test_a_wrong_option_is_one_clear_error(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        VQAScore(**{"variant": "t5", **options})
