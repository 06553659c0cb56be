from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError, InvalidReward, NotDifferentiable
from diffalign.registry import register_reward
from diffalign.scoring import Reward, Score, WeightedReward, make_reward, require_gradient, score


def media_of(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 6, 5, generator=torch.Generator().manual_seed(seed))


def cases_of(rows: int) -> list[Case]:
    return [Case(prompt=f"prompt {k}", seed=k) for k in range(rows)]


@dataclasses.dataclass(frozen=True)
class Wordy:
    """Depends on pixels and prompt; NaN where the picture is dark."""

    dark: float = 0.0
    name: str = "wordy"
    differentiable: bool = True
    modality: str = "image"
    version: str | None = None
    range: tuple[float, float] | None = (0.0, 100.0)

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        words = torch.tensor([float(len(c.prompt)) for c in cases])
        light = media.mean((1, 2, 3))
        total = torch.where(light < self.dark, torch.nan, light + words)
        return Score(total, {"light": light, "words": words})


def same(a: Score, b: Score) -> bool:
    keys = a.parts.keys() == b.parts.keys()
    rows = torch.equal(a.valid, b.valid) and torch.allclose(a.total, b.total, equal_nan=True)
    return keys and rows and all(torch.allclose(a.parts[k], b.parts[k], equal_nan=True) for k in a.parts)


@given(rows=st.integers(1, 9), chunk=st.integers(1, 12), dark=st.floats(0.4, 0.5))
def test_chunk_size_changes_no_score(rows: int, chunk: int, dark: float) -> None:
    reward, media, cases = Wordy(dark), media_of(rows), cases_of(rows)
    assert same(
        score(reward, media, cases, chunk=chunk, all_invalid=True), score(reward, media, cases, all_invalid=True)
    )


@given(st.permutations(range(6)))
def test_permuting_the_cases_permutes_the_scores(order: list[int]) -> None:
    media, cases = media_of(6), cases_of(6)
    reward = make_reward([Wordy(0.5), "brightness:2"])
    shuffled = score(reward, media[order], [cases[k] for k in order], all_invalid=True)
    assert same(shuffled, score(reward, media, cases, all_invalid=True).select(order))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=2))
def test_a_weighted_reward_is_the_sum_of_weight_times_part(weights: list[float]) -> None:
    media, cases = media_of(4), cases_of(4)
    found = score(WeightedReward([Wordy(), make_reward("brightness")], weights), media, cases)
    expected = sum(w * found.parts[name] for w, name in zip(weights, ["wordy", "brightness"], strict=True))
    assert torch.allclose(found.total, torch.as_tensor(expected), atol=1e-5)
    assert {"wordy", "wordy/light", "wordy/words", "brightness"} == set(found.parts)


@given(st.floats(0.3, 0.7))
def test_one_invalid_part_makes_the_row_invalid_and_a_weight_of_zero_does_not(dark: float) -> None:
    media, cases = media_of(5), cases_of(5)
    alone = score(Wordy(dark), media, cases, all_invalid=True)
    counted = score(WeightedReward([Wordy(dark), make_reward("brightness")], [1, 1]), media, cases, all_invalid=True)
    shown = score(WeightedReward([Wordy(dark), make_reward("brightness")], [0, 1]), media, cases)
    assert torch.equal(counted.valid, alone.valid)
    assert torch.equal(counted.total.isnan(), ~alone.valid)
    assert shown.valid.all()
    assert torch.equal(shown.total, score(make_reward("brightness"), media, cases).total)


def test_the_range_of_a_sum_follows_the_weights() -> None:
    assert WeightedReward([Wordy(), make_reward("brightness")], [0.5, -2.0]).range == (-2.0, 50.0)
    assert WeightedReward([Wordy(range=None), make_reward("brightness")], [1, 1]).range is None


def test_infinity_is_an_error_that_names_reward_count_and_prompt() -> None:
    reward = make_reward(lambda media, cases: torch.tensor([1.0, torch.inf, -torch.inf]))
    with pytest.raises(InvalidReward, match=r"'<lambda>' is infinite for 2 of 3 rows, first for the prompt 'prompt 1'"):
        score(reward, media_of(3), cases_of(3))


def test_every_row_invalid_is_an_error_over_the_call_and_not_over_a_chunk() -> None:
    media = torch.cat([torch.zeros(2, 3, 6, 5), torch.ones(1, 3, 6, 5)])
    assert score(Wordy(0.5), media, cases_of(3), chunk=1).valid.tolist() == [False, False, True]
    with pytest.raises(InvalidReward, match=r"'wordy' is NaN for all 2 rows.*'prompt 0'"):
        score(Wordy(0.5), media[:2], cases_of(2))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (torch.zeros(2, 1), r"shape \(2, 1\) for 2 rows"),
        (torch.zeros(()), r"shape \(\)"),
        ([1.0, 2.0], "list"),
        (None, "NoneType"),
        (Score(torch.zeros(3)), r"shape \(3,\)"),
    ],
)
def test_a_wrong_shape_is_an_error_that_says_what_to_return(answer: Any, says: str) -> None:
    with pytest.raises(InvalidReward, match=says):
        score(make_reward(lambda media, cases: answer), media_of(2), cases_of(2))


@pytest.mark.parametrize(
    ("media", "cases", "chunk", "says"),
    [
        (media_of(2), cases_of(3), None, "2 images and 3 cases"),
        (media_of(0), [], None, "at least one"),
        (torch.rand(2, 1, 6, 5), cases_of(2), None, r"shape \(2, 1, 6, 5\)"),
        (torch.rand(3, 6, 5), cases_of(3), None, r"shape \(3, 6, 5\)"),
        (media_of(2), cases_of(2), 0, "chunk is 0"),
    ],
)
def test_wrong_input_is_refused_before_the_reward_runs(
    media: Tensor, cases: list[Case], chunk: int | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        score(make_reward("brightness"), media, cases, chunk=chunk)


def test_modality_is_checked() -> None:
    with pytest.raises(ConfigError, match="judges videos"):
        score(Wordy(modality="video"), media_of(2), cases_of(2))
    with pytest.raises(ConfigError, match="no source image"):
        score(Wordy(modality="edit"), media_of(2), cases_of(2))
    edited = [dataclasses.replace(case, source=Image.new("RGB", (4, 4))) for case in cases_of(2)]
    assert score(Wordy(modality="edit"), media_of(2), edited).valid.all()
    with pytest.raises(ConfigError, match="image and video cannot be added up"):
        WeightedReward([Wordy(), Wordy(name="moving", modality="video")], [1, 1])


def test_an_image_reward_scores_a_video_by_the_mean_of_its_frames() -> None:
    video = torch.rand(2, 3, 3, 6, 5, generator=torch.Generator().manual_seed(1))  # (B, F, 3, H, W)
    each = [score(make_reward("brightness"), video[:, k], cases_of(2)).total for k in range(3)]
    assert torch.allclose(score(make_reward("brightness"), video, cases_of(2)).total, torch.stack(each).mean(0))


def test_scores_are_float32_whatever_the_media() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = score(make_reward("brightness"), media_of(2).to(dtype), cases_of(2))
        assert found.total.dtype == torch.float32
    strict = score(make_reward(lambda media, cases: torch.tensor([True, False])), media_of(2), cases_of(2))
    assert strict.total.tolist() == [1.0, 0.0]


def test_the_gradient_passes_through_a_weighted_sum() -> None:
    media = media_of(2).requires_grad_()
    score(make_reward(["brightness:3", Wordy()]), media, cases_of(2), chunk=1).total.sum().backward()
    assert media.grad is not None
    assert torch.allclose(media.grad.sum((1, 2, 3)), torch.tensor([4.0, 4.0]), atol=1e-4)


def test_without_grad_mode_there_is_no_graph() -> None:
    with torch.no_grad():
        assert not score(make_reward("brightness"), media_of(2).requires_grad_(), cases_of(2)).total.requires_grad


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_concatenating_slices_gives_the_whole(sizes: list[int]) -> None:
    whole = score(Wordy(0.5), media_of(sum(sizes)), cases_of(sum(sizes)), all_invalid=True)
    ends = list(itertools.accumulate(sizes, initial=0))
    assert same(Score.concat([whole.select(slice(a, b)) for a, b in itertools.pairwise(ends)]), whole)


def test_a_row_marked_invalid_has_no_total() -> None:
    found = Score(torch.tensor([1.0, 2.0, torch.nan]), {}, torch.tensor([True, False, True]))
    assert found.valid.tolist() == [True, False, False]
    assert found.total.isnan().tolist() == [False, True, True]


def test_a_reward_without_gradient_is_named_with_the_reason() -> None:
    require_gradient(make_reward("brightness"), "noise optimisation")
    with pytest.raises(
        NotDifferentiable, match=r"^noise optimisation needs a gradient, and reward 'jpeg_size' has none \(JPEG"
    ):
        require_gradient(make_reward(["brightness", "jpeg_size"]), "noise optimisation")


def test_an_object_that_follows_the_protocol_is_used_as_it_is() -> None:
    reward = Wordy()
    assert isinstance(reward, Reward)
    assert make_reward(reward) is reward
    assert make_reward(Wordy).name == "wordy"
    both = make_reward(["brightness", (Wordy(), 2)])
    assert make_reward(both) is both


def test_a_function_gets_its_weight_in_a_pair() -> None:
    def dark(media: Tensor, cases: Sequence[Case]) -> Tensor:
        return 1 - media.mean((1, 2, 3))

    media = media_of(2)
    found = score(make_reward([(dark, 0.5), ("brightness:2", 0.5)]), media, cases_of(2))
    assert torch.allclose(found.total, 0.5 * found.parts["dark"] + found.parts["brightness"])


def test_a_frozen_dataclass_takes_options_and_an_alias() -> None:
    register_reward("wordy_here")(type("Here", (Wordy,), {"__module__": __name__}))
    made: Any = make_reward({"other": {"reward": "wordy_here", "dark": 1}})
    assert (made.name, made.dark) == ("other", 1.0)


@pytest.mark.parametrize(
    ("media", "says"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"dtype torch.uint8; rewards take floats in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), 200.0), "values up to 200; rewards take"),
        (torch.zeros(1, 3, 0, 8), "have no pixels"),
        (torch.zeros(1, 0, 3, 8, 8), "have no pixels"),
    ],
)
def test_pictures_on_another_scale_or_without_pixels_are_refused(media: torch.Tensor, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        score(make_reward("brightness"), media, [Case(prompt="a")])


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_pixels_that_are_not_finite_is_invalid_and_never_shown_to_the_reward(odd: float) -> None:
    def blind(media: torch.Tensor, cases: list[Case]) -> torch.Tensor:
        assert media.isfinite().all()
        assert len(media) == len(cases)
        return torch.zeros(len(media))

    media = torch.rand(3, 3, 4, 4)
    media[1, 2, 0, 0] = odd
    found = score(make_reward(blind), media, [Case(prompt=str(k)) for k in range(3)])
    assert found.valid.tolist() == [True, False, True]
    assert found.total[1].isnan()
    alone = score(make_reward(blind), media[1:2], [Case(prompt="1")], all_invalid=True)
    assert not alone.valid.any()


def test_a_prompt_with_half_a_character_is_invalid_only_where_the_prompt_is_read() -> None:
    cases = [Case(prompt="two red circles"), Case(prompt="\ud800")]
    media = torch.rand(2, 3, 64, 64)
    assert score(make_reward("brightness"), media, cases).valid.all()
    assert score(make_reward("clip"), media, cases).valid.tolist() == [True, False]


def test_a_part_that_does_not_apply_to_a_row_is_none_like_an_invalid_row() -> None:
    found = Score(torch.tensor([1.0, torch.nan]), {"a": torch.tensor([torch.nan, 2.0]), "b": torch.tensor([3.0, 4.0])})
    assert [found.parts_at(k) for k in (0, 1)] == [{"a": None, "b": 3.0}, {"a": None, "b": None}]


def test_chunks_keep_neighbours_of_one_prompt_together_for_a_reward_that_compares_them() -> None:
    class Beside:
        name, differentiable, modality, version, range = "beside", False, "image", None, None
        listwise = True

        def __init__(self) -> None:
            self.seen: list[list[str]] = []

        def __call__(self, media: torch.Tensor, cases: Sequence[Case]) -> torch.Tensor:
            self.seen.append([case.prompt for case in cases])
            return torch.zeros(len(cases))

    cases = [Case(prompt=prompt) for prompt in "aaabbccc"]
    reward = Beside()
    score(reward, torch.zeros(8, 3, 4, 4), cases, chunk=2)
    assert reward.seen == [list("aaa"), list("bb"), list("ccc")]
    reward.listwise, reward.seen = False, []
    score(reward, torch.zeros(8, 3, 4, 4), cases, chunk=3)
    assert reward.seen == [list("aaa"), list("bbc"), list("cc")]
