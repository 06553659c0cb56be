from __future__ import annotations

import dataclasses
import multiprocessing
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffalign import score_cache
from diffalign.cases import Case
from diffalign.errors import OutputError
from diffalign.score_cache import keys_of
from diffalign.scoring import Score, ScoreCache, make_reward, score

MEDIA = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
CASES = [Case(prompt=f"p{k}") for k in range(4)]


class Counting:
    name, differentiable, modality, range = "counting", True, "image", None

    def __init__(self, version: str | None = "1", **options: Any) -> None:
        self.version, self.options, self.rows, self.dark = version, options, 0, 0.0

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        self.rows += len(cases)
        light = media.float().mean((1, 2, 3))
        return Score(torch.where(light < self.dark, torch.nan, light), {"twice": light * 2})


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "deep" / "scores.sqlite")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.integers(0, 3), min_size=1, max_size=8), chunk=st.integers(1, 4))
def test_cached_scores_equal_recomputed_ones(cache: ScoreCache, picks: list[int], chunk: int) -> None:
    media, cases = MEDIA[picks], [CASES[k] for k in picks]
    fresh = score(Counting(), media, cases)
    for _ in range(2):
        found = score(Counting(), media, cases, chunk=chunk, cache=cache)
        assert torch.equal(found.total, fresh.total)
        assert torch.equal(found.parts["twice"], fresh.parts["twice"])


def test_rows_are_looked_up_one_by_one(cache: ScoreCache) -> None:
    reward = Counting()
    score(reward, MEDIA[:3], CASES[:3], cache=cache)
    found = score(reward, MEDIA.flip(0), CASES[::-1], cache=cache)
    assert reward.rows == 4
    assert torch.equal(found.total, MEDIA.flip(0).mean((1, 2, 3)))


def test_a_reward_without_a_version_is_never_cached(cache: ScoreCache) -> None:
    reward = Counting(version=None)
    for _ in range(2):
        score(reward, MEDIA, CASES, cache=cache)
    assert (reward.rows, len(cache)) == (8, 0)


def test_a_reward_whose_options_are_unknown_is_never_cached(cache: ScoreCache) -> None:
    reward = Counting()
    del reward.options
    score(reward, MEDIA, CASES, cache=cache)
    assert len(cache) == 0


def test_invalid_rows_are_asked_again(cache: ScoreCache) -> None:
    reward = Counting()
    reward.dark = float(MEDIA.mean((1, 2, 3)).median()) + 1e-4
    invalid = int((~score(reward, MEDIA, CASES, cache=cache).valid).sum())
    assert 0 < invalid < 4
    assert len(cache) == 4 - invalid
    score(reward, MEDIA, CASES, cache=cache)
    assert reward.rows == 4 + invalid


def test_media_that_needs_a_gradient_is_not_answered_from_the_cache(cache: ScoreCache) -> None:
    score(Counting(), MEDIA, CASES, cache=cache)
    assert score(Counting(), MEDIA.clone().requires_grad_(), CASES, cache=cache).total.requires_grad


def test_a_weighted_sum_caches_its_parts_so_new_weights_cost_nothing(cache: ScoreCache) -> None:
    reward = Counting()
    score(make_reward([reward, "brightness"]), MEDIA, CASES, cache=cache)
    score(make_reward([reward, "brightness:5"]), MEDIA, CASES, cache=cache)
    assert reward.rows == 4


def _image(value: int, mode: str = "L") -> Image.Image:
    return Image.new(mode, (2, 2), value)


def test_everything_a_score_depends_on_is_in_the_key() -> None:
    case = CASES[0]
    asked = [
        *(
            dataclasses.replace(case, **{slot: image})
            for slot in ("source", "control", "reference")
            for image in (_image(0), _image(1))
        ),
        dataclasses.replace(case, source=_image(0, "P")),
        dataclasses.replace(case, metadata={"n": 1}),
        dataclasses.replace(case, metadata={"n": "1"}),
        dataclasses.replace(case, metadata={"n": True}),
        dataclasses.replace(case, metadata={"n": [1]}),
        dataclasses.replace(case, metadata={"n": (1,)}),
        dataclasses.replace(case, metadata={1: 1}),
        dataclasses.replace(case, metadata={"1": 1}),
        dataclasses.replace(case, prompt="\ud800"),
        case,
    ]
    keys = [keys_of(Counting(), MEDIA[:1], [c])[0] for c in asked]
    pixels = [MEDIA[:1] + 1e-6, MEDIA[:1].half(), MEDIA[:1].reshape(1, 3, 5, 6), MEDIA[:1].double()]
    keys += [keys_of(Counting(), media, [case])[0] for media in pixels]
    keys += [
        keys_of(r, MEDIA[:1], [case])[0]
        for r in (Counting("2"), Counting(power=1), Counting(power=1.5), make_reward("brightness"))
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_depend_on_the_order_of_metadata_or_the_seed() -> None:
    a, b = Case(prompt="p", metadata={"x": 1, "y": 2}), Case(prompt="p", metadata={"y": 2, "x": 1}, seed=9)
    assert keys_of(Counting(), MEDIA[:1], [a]) == keys_of(Counting(), MEDIA[:1], [b])


def test_metadata_without_content_to_hash_is_not_cached() -> None:
    assert keys_of(Counting(), MEDIA[:1], [Case(prompt="p", metadata={"x": object()})]) == [None]


@pytest.mark.parametrize("damage", ["text", "middle", "zeros"])
def test_an_unreadable_file_is_set_aside_and_replaced(cache: ScoreCache, damage: str) -> None:
    score(Counting(), MEDIA, CASES, cache=cache)
    content = bytearray(cache.path.read_bytes())
    bad = {
        "text": b"not a database, " * 400,
        "middle": bytes(content[:100]) + b"\xff" * (len(content) - 100),
        "zeros": b"\1" * 5000,
    }
    cache.path.write_bytes(bad[damage])
    reward = Counting()
    with pytest.warns(UserWarning, match=r"unreadable .*a new one starts"):
        found = score(reward, MEDIA, CASES, cache=cache)
    assert torch.equal(found.total, MEDIA.mean((1, 2, 3)))
    score(reward, MEDIA, CASES, cache=cache)
    assert reward.rows == 4
    assert cache.path.with_name("scores.sqlite.unreadable").read_bytes() == bad[damage]


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"important": 1}' * 100)
    with pytest.raises(OutputError, match=r"another kind of file .* left alone"):
        score(Counting(), MEDIA, CASES, cache=ScoreCache(mine))
    assert mine.read_text() == '{"important": 1}' * 100


def test_a_file_of_zero_bytes_is_a_new_cache(tmp_path: Path) -> None:
    (tmp_path / "c").touch()
    assert len(ScoreCache(tmp_path / "c")) == 0


def test_a_place_that_cannot_hold_a_cache_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot make the folder"):
        ScoreCache(tmp_path / "file" / "c")
    with pytest.raises(OutputError, match="cannot use the score cache"):
        score(Counting(), MEDIA, CASES, cache=ScoreCache(tmp_path))


def _write(path: Path, who: int) -> None:
    cache = ScoreCache(path)
    for k in range(20):
        keys = [f"{who}-{k}", f"shared-{k}"]
        cache.store(keys, [(float(k), {}), (float(k), {"p": 1.0})])
        assert None not in cache.lookup(keys)


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path / "c.sqlite", who)) for who in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(ScoreCache(tmp_path / "c.sqlite")) == 4 * 20 + 20
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_several_processes_meet_one_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"not a database, " * 400)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path / "c.sqlite", who)) for who in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(ScoreCache(tmp_path / "c.sqlite")) >= 60


def test_a_row_with_damaged_content_is_scored_again(cache: ScoreCache) -> None:
    fresh = score(Counting(), MEDIA, CASES, cache=cache)
    with sqlite3.connect(cache.path) as db:
        db.execute("UPDATE scores_1 SET parts = '{\"twice\": '")
    reward = Counting()
    assert torch.equal(score(reward, MEDIA, CASES, cache=cache).total, fresh.total)
    assert reward.rows == 4


def test_rows_asked_and_rows_answered_are_counted_by_reward(cache: ScoreCache) -> None:
    score(Counting(), MEDIA[:3], CASES[:3], cache=cache)
    assert (cache.asked["counting"], cache.answered["counting"]) == (3, 0)
    score(make_reward([Counting(), "brightness"]), MEDIA, CASES, cache=cache)
    assert (cache.asked["counting"], cache.answered["counting"]) == (4, 3)
    assert (cache.asked["brightness"], cache.answered["brightness"]) == (4, 0)


def test_without_a_path_rows_are_counted_and_not_kept() -> None:
    cache, reward = ScoreCache(None), Counting()
    for _ in range(2):
        assert torch.equal(score(reward, MEDIA, CASES, cache=cache).total, MEDIA.mean((1, 2, 3)))
    assert (reward.rows, cache.asked["counting"], cache.answered["counting"], len(cache)) == (8, 8, 0, 0)


def test_many_keys_are_looked_up_at_once_in_their_order(cache: ScoreCache) -> None:
    keys = [f"k{k}" for k in range(1300)]
    cache.store(keys[::2], [(float(k), {"p": k / 2}) for k in range(0, 1300, 2)])
    found = cache.lookup([*keys, None, "k2"])
    assert found[0::2][:650] == [(float(k), {"p": k / 2}) for k in range(0, 1300, 2)]
    assert found[1:1300:2] == [None] * 650
    assert found[-2:] == [None, (2.0, {"p": 1.0})]


def test_pixels_that_are_held_are_hashed_once_and_again_after_a_write(
    cache: ScoreCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    media, hashed = MEDIA.clone(), []
    digest = score_cache._digest
    monkeypatch.setattr(score_cache, "_digest", lambda row: hashed.append(row) or digest(row))
    cache.hold(media)
    for spec in ("brightness", "colourfulness", Counting()):
        score(make_reward(spec), media, CASES, cache=cache)
    assert len(hashed) == 4
    assert cache.keys(Counting(), media, CASES) == keys_of(Counting(), media, CASES)
    assert cache.keys(Counting(), media.flip(0), CASES) == keys_of(Counting(), media.flip(0), CASES)
    media[0] = 0.0
    assert cache.keys(Counting(), media, CASES) == keys_of(Counting(), media, CASES)


class Times:
    """An object that somebody made, with a number that nobody else sees."""

    version = "1"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, media: torch.Tensor, cases: list[Case]) -> torch.Tensor:
        return self.factor * media.mean((1, 2, 3))


def enclosing(factor: float) -> Any:
    def scaled(media: torch.Tensor, cases: list[Case]) -> torch.Tensor:
        return factor * media.mean((1, 2, 3))

    scaled.version = "1"  # type: ignore[attr-defined]
    return scaled


@pytest.mark.parametrize("make", [Times, enclosing])
def test_objects_and_functions_of_one_kind_are_not_served_each_others_scores(make: Any, tmp_path: Path) -> None:
    cache, media, cases = ScoreCache(tmp_path / "c.sqlite"), torch.ones(1, 3, 4, 4), [Case(prompt="a")]
    found = [float(score(make_reward(make(factor)), media, cases, cache=cache).total) for factor in (2.0, 3.0, 2.0)]
    assert found == [2.0, 3.0, 2.0]
