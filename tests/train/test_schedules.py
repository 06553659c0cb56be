from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign import config
from diffalign.errors import ConfigError
from diffalign.train import schedules
from diffalign.train.schedules import NoiseConfig, noise_levels, window_start


def test_annealed_noise_is_that_of_the_spec() -> None:
    # credit_assignment.md 2.5: a_max = 1, d = 8, a_min = .3, ten steps
    assert schedules.annealed(10, 1, 8, 0.3) == pytest.approx([1, 0.867, 0.716, 0.545, 0.351] + [0.3] * 5, abs=5e-4)


def test_the_papers_temperatures_start_cross_1_and_end_where_they_should() -> None:
    for at, value in ((0, 1.2), (4.558, 1.0), (18.548, 0.1), (19, 0.1)):  # credit_assignment.md 2.5: d = 25
        assert schedules.anneal(at, 1.2, 25, 0.1) == pytest.approx(value, abs=1e-4)
    assert schedules.anneal(18.5, 1.2, 25, 0.1) > 0.1


@given(st.floats(0.05, 2), st.floats(1e-6, 1e6), st.floats(0.01, 1), st.integers(1, 60))
def test_annealed_noise_starts_at_the_level_never_rises_and_ends_on_the_floor(
    level: float, d: float, share: float, T: int
) -> None:
    levels = schedules.annealed(T, level, d, share * level)
    assert levels[0] == pytest.approx(level)
    assert levels == sorted(levels, reverse=True)
    assert min(levels) >= share * level


def test_growth_keeps_exploring_longer_as_training_goes_on() -> None:
    made = NoiseConfig(level=1, anneal=8, growth=5)
    assert noise_levels(0, 11, made)[:10] == schedules.annealed(10, 1, 8, 0.3)
    assert noise_levels(3, 11, made)[:10] == schedules.annealed(10, 1, 23, 0.3)


def test_without_a_window_every_step_but_the_last_has_noise() -> None:
    assert noise_levels(0, 4, NoiseConfig()) == [0.7, 0.7, 0.7, 0]
    assert noise_levels(0, 4, NoiseConfig(train_last=True)) == [0.7] * 4
    assert noise_levels(0, 4, NoiseConfig(low=1, high=2)) == [0, 0.7, 0, 0]


def test_annealed_noise_inside_a_window_is_that_of_its_steps() -> None:
    levels = noise_levels(0, 10, NoiseConfig(level=1, anneal=8, window=2, low=3))
    assert levels == pytest.approx([0, 0, 0, 0.545, 0.351, 0, 0, 0, 0, 0], abs=5e-4)


RULES = st.sampled_from(["fixed", "uniform", "progressive", "geometric"])


@given(RULES, st.integers(2, 30), st.integers(0, 500), st.integers(0, 2**40), st.booleans(), st.data())
def test_a_window_has_its_width_and_stays_in_its_range(
    rule: str, T: int, step: int, seed: int, train_last: bool, data: st.DataObject
) -> None:
    end = T if train_last else T - 1
    low = data.draw(st.integers(0, end - 1))
    high = data.draw(st.one_of(st.none(), st.integers(low + 1, end)))
    window = data.draw(st.integers(1, (high or end) - low))
    made = NoiseConfig(rule=rule, window=window, low=low, high=high, train_last=train_last, every=3, decay=0.1)
    start = window_start(step, T, made, seed=seed)
    assert low <= start <= (high or end) - window
    levels = noise_levels(step, T, made, seed=seed)
    assert [i for i, level in enumerate(levels) if level] == list(range(start, start + window))
    assert levels == noise_levels(step, T, made, seed=seed)


def test_a_uniform_window_starts_anywhere_up_to_its_last_place_equally_often() -> None:
    made = NoiseConfig(rule="uniform", window=3, high=5)  # Flow-GRPO-Fast: window 3 in [0, 5)
    seen = Counter(window_start(step, 10, made, seed=1) for step in range(3000))
    assert sorted(seen) == [0, 1, 2]
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in seen.values())
    assert [window_start(k, 10, made, seed=1) for k in range(20)] != [
        window_start(k, 10, made, seed=2) for k in range(20)
    ]


def test_geometric_windows_have_the_probabilities_of_the_spec() -> None:
    # credit_assignment.md 3.3: T = 10, w = 4, r = .5
    wanted = [0.50794, 0.25397, 0.12698, 0.06349, 0.03175, 0.01587]
    assert schedules.geometric_probabilities(6, 0.5) == pytest.approx(wanted, abs=5e-6)
    made = NoiseConfig(rule="geometric", window=4)
    seen = Counter(window_start(step, 10, made) for step in range(4000))
    assert sorted(seen) == list(range(6))
    for start, probability in enumerate(wanted):
        assert abs(seen[start] / 4000 - probability) < 5 * math.sqrt(probability / 4000)


def test_a_geometric_window_that_fades_at_once_stays_at_the_first_start() -> None:
    assert {window_start(k, 10, NoiseConfig(rule="geometric", window=4, fade=0.0)) for k in range(50)} == {0}


def test_a_progressive_window_visits_every_start_once_in_a_sweep_and_begins_again() -> None:
    made = NoiseConfig(rule="progressive", window=4, every=25, train_last=True)
    starts = [window_start(step, 25, made) for step in range(25 * 22 + 1)]
    assert starts == [start for start in range(22) for _ in range(25)] + [0]


def test_a_decaying_progressive_window_hurries_through_late_starts() -> None:
    # credit_assignment.md 3.2: 25 iterations at start 13, 23 at 14, 13 at 20
    durations = schedules.stays(22, 25, 0.1)
    assert (durations[0], durations[13], durations[14], durations[20]) == (25, 25, 23, 13)
    made = NoiseConfig(rule="progressive", window=4, decay=0.1, train_last=True)
    seen = Counter(window_start(step, 25, made) for step in range(sum(durations)))
    assert [seen[start] for start in range(22)] == durations
    late = NoiseConfig(rule="progressive", window=4, decay=0.1, train_last=True, low=14)
    assert [window_start(step, 25, late) for step in (0, 22, 23)] == [14, 14, 15]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"level": 0.0}, "without noise there is no ratio"),
        ({"kernel": "cps", "level": 1.2}, "cps kernel takes at most 1"),
        ({"anneal": 0.0}, "counts steps above 0"),
        ({"anneal": 8.0, "least": 0.9}, "at most at noise.level 0.7"),
        ({"growth": 1.0}, "no noise.anneal"),
        ({"anneal": 8.0, "growth": -1.0}, "may only lengthen"),
        ({"window": -1}, "neither can be negative"),
        ({"rule": "uniform"}, r"noise.window is 0 \(all steps\)"),
        ({"every": 0}, "at least 1 and 0"),
        ({"fade": 1.0}, "to below 1"),
        ({"rule": "random"}, "one of 'fixed', 'uniform'"),
    ],
)
def test_settings_without_sense_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.build(NoiseConfig, given, where="noise")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": 10}, "only 9 may have noise"),
        ({"high": 10}, "Set noise.train_last"),
        ({"high": 12}, "up to step 8 only.$"),
        ({"low": 9}, "only 0 may have noise"),
    ],
)
def test_windows_that_do_not_fit_the_chain_are_refused(given: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        NoiseConfig(**given).span(10)
