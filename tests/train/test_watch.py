from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign import world
from diffalign.errors import ConfigError
from diffalign.train.overoptimisation import pooled_std
from diffalign.train.watch import Evaluation, Verdict, Watch, WatchConfig

COUNT, EACH = 16, 4
ROWS = COUNT * EACH
PROMPTS = torch.arange(COUNT).repeat_interleave(EACH)
SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
Spoil = Callable[[Tensor], Tensor]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def scenes(seed: int, right: bool) -> Tensor:
    """Four scenes for each of sixteen prompts, or for other prompts; soft and a little noisy, as a model draws."""
    rng = random.Random(seed)
    wanted = [world.sample_clauses("two" if k % 2 else "binding", random.Random(k)) for k in range(COUNT)]
    asked = [c if right else world.sample_clauses("position", rng) for c in wanted for _ in range(EACH)]
    sharp = world.render_many([world.sample_scene(clauses, rng) for clauses in asked])
    return (F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False) + 0.004 * drawn(seed, *sharp.shape)).clamp(0, 1)


def mixed(base: Tensor, other: Tensor, share: float) -> Tensor:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(7))
    return torch.where((order < share * ROWS).view(-1, 1, 1, 1), other, base)


@cache
def base() -> Tensor:
    return mixed(scenes(0, False), scenes(1, True), 0.5)


def evaluation(step: int, media: Tensor, gain: float = 0.0, **given: Any) -> Evaluation:
    return Evaluation(step=step, prompts=PROMPTS, media=media, **{"proxy": drawn(1, ROWS) + gain} | given)


def run(medias: list[Tensor], config: WatchConfig = WatchConfig()) -> list[Verdict]:
    watch = Watch(config)
    return [watch.observe(evaluation(10 * k, media, 0.3 * k)) for k, media in enumerate(medias)]


def names(verdicts: list[Verdict]) -> set[str]:
    return {alarm.signature for verdict in verdicts for alarm in verdict.alarms}


def saturate(media: Tensor) -> Tensor:
    grey = media.mean(1, keepdim=True)
    return (grey + 3 * (media - grey)).clamp(0, 1)


HACKS: dict[str, tuple[Spoil, str]] = {
    "a blank background": (lambda m: m[:, :, :1, :1].expand_as(m), "flat_high"),
    "one colour everywhere": (lambda m: torch.tensor([0.9, 0.2, 0.6]).view(1, 3, 1, 1).expand_as(m), "dominant_high"),
    "over-saturation": (saturate, "vividness_high"),
    "copies": (lambda m: m[:1].expand_as(m), "nearest_low"),
    "noise": (lambda m: (m + 0.15 * drawn(9, *m.shape)).clamp(0, 1), "sharpness_high"),
    "a grid": (lambda m: (m + 0.2 * (torch.arange(64) % 2 * 2.0 - 1)).clamp(0, 1), "high_frequency_high"),
    "darkness": (lambda m: 0.05 * m, "brightness_low"),
    "brightness": (lambda m: 0.97 + 0.03 * m, "brightness_high"),
    "tiny files": (lambda m: m.mean((2, 3), keepdim=True).expand_as(m), "jpeg_bytes_low"),
    "blur": (lambda m: F.avg_pool2d(m, 9, 1, 4, count_include_pad=False), "sharpness_low"),
}


@pytest.mark.parametrize(("spoil", "sign"), HACKS.values(), ids=HACKS)
def test_a_hack_is_raised_while_few_pictures_show_it(spoil: Spoil, sign: str) -> None:
    shown = [mixed(base(), spoil(base()), share) for share in SHARES[:4]]
    verdicts = run(shown)
    assert sign in names(verdicts)
    alarm = next(a for v in verdicts for a in v.alarms if a.signature == sign)
    hacked = (shown[alarm.step // 10] - base()).flatten(1).abs().amax(1) > 0
    assert hacked[list(alarm.images[:5])].sum() >= 4  # what was copied is unchanged and shows it too


@pytest.mark.parametrize(("spoil", "sign"), HACKS.values(), ids=HACKS)
def test_a_hack_that_creeps_into_every_picture_is_raised(spoil: Spoil, sign: str) -> None:
    assert names(run([base() + (spoil(base()) - base()) * share for share in (0, 0.25, 0.5, 0.75, 1)]))


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_learns_the_prompts_raises_nothing(seed: int) -> None:
    better = scenes(10 + seed, True)
    verdicts = run([mixed(base(), better, share) for share in SHARES])
    assert not names(verdicts)
    assert {verdict.action for verdict in verdicts} == {"continue"}
    assert verdicts[-1].best_step == 60


def test_a_frozen_model_raises_nothing_whatever_the_seeds() -> None:
    alike = [mixed(scenes(100 + k, False), scenes(200 + k, True), 0.5) for k in range(12)]
    assert not names(run([base(), *alike]))


def test_nothing_has_changed_at_the_base_model() -> None:
    gold = {"other": drawn(2, ROWS)}
    first = Watch().observe(evaluation(0, base(), panel=gold, truth=drawn(3, ROWS), kl=0.0))
    told = first.metrics
    assert (told["proxy_gain"], told["heldout_gain"], told["hacking_gap"], told["truth_gain"]) == (0, 0, 0, 0)
    assert (told["diversity"], told["diversity_across"], told["vendi_ratio"], told["kl_base"]) == (1, 1, 1, 0)
    assert (first.alarms, first.action, first.best_step) == ((), "continue", 0)


def test_a_resumed_watch_gives_the_same_verdicts_to_the_bit() -> None:
    def shown(k: int) -> Evaluation:
        media = mixed(base(), HACKS["noise"][0](base()), SHARES[k])
        panel = {"a": drawn(20 + k, ROWS) / 3, "b": torch.where(drawn(k, ROWS) > 2, math.nan, drawn(5, ROWS))}
        extras: dict[str, Any] = {"truth": drawn(30 + k, ROWS), "prompt_margin": drawn(40 + k, ROWS) + 1}
        return evaluation(k, media, k / 3, panel=panel, kl=0.1 * k, training={"grad_norm": 1.0 + k}, **extras)

    config = WatchConfig(action="rollback", patience=3, at_once=9)
    whole = Watch(config)
    actions = set()
    for k in range(len(SHARES)):
        resumed = Watch(config)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
        a, b = whole.observe(shown(k)), resumed.observe(shown(k))
        assert a == b
        assert whole.state_dict() == resumed.state_dict()
        actions.add(a.action)
    assert actions == {"continue", "rollback"}
    assert whole.state_dict()["best"] is not None


def test_the_state_is_a_copy() -> None:
    watch = Watch()
    watch.observe(evaluation(0, base()))
    state = watch.state_dict()
    before = json.dumps(state)
    watch.observe(evaluation(1, base()))
    assert json.dumps(state) == before


def test_the_truth_is_logged_and_decides_nothing_unless_it_may() -> None:
    def judged(falling: float, config: WatchConfig) -> list[Verdict]:
        watch = Watch(config)
        truths = [drawn(3, ROWS) + falling * k for k in range(4)]
        return [watch.observe(evaluation(k, base(), 0.2 * k, truth=truths[k])) for k in range(4)]

    worse, better = judged(-0.5, WatchConfig()), judged(0.5, WatchConfig())
    assert worse[-1].metrics["truth_gain"] < 0 < better[-1].metrics["truth_gain"]
    for a, b in zip(worse, better, strict=True):
        assert (a.alarms, a.action, a.best_step) == (b.alarms, b.action, b.best_step)
    assert (worse[-1].best_step, judged(-0.5, WatchConfig(read_truth=True))[-1].best_step) == (3, 0)


def test_an_alarm_waits_for_patience_and_is_raised_once_until_it_is_quiet() -> None:
    watch, hacked = Watch(WatchConfig(read=("kl",), kl_ceiling=1.0)), []
    for k, kl in enumerate((0.0, 1.5, 0.5, 1.5, 1.5, 1.5, math.nan, 1.5, 0.5, 1.5, 1.5, 0.5, 5.0)):
        verdict = watch.observe(evaluation(k, base(), kl=kl))
        hacked += [k for _ in verdict.alarms]
    assert hacked == [4, 7, 10, 12]


def test_what_follows_is_what_the_config_says() -> None:
    def actions(action: Any) -> list[str]:
        watch = Watch(WatchConfig(action=action, read=("kl",), kl_ceiling=1.0, patience=1))
        return [watch.observe(evaluation(k, base(), kl=kl)).action for k, kl in enumerate((0.0, 2.0, 0.0, 2.0))]

    assert actions("alarm") == ["continue", "alarm", "continue", "alarm"]
    assert actions("stop") == ["continue", "stop", "continue", "stop"]
    assert actions("rollback") == ["continue", "rollback", "continue", "rollback"]


def test_going_back_forgets_what_came_after() -> None:
    watch = Watch()
    for k in range(5):
        watch.observe(evaluation(10 * k, base(), 0.5 * k))
    assert watch.best_step == 40
    assert watch.observe(evaluation(20, base(), 1.0)).best_step == 20
    assert [row["step"] for row in watch.state_dict()["rows"]] == [0, 10, 20]


def best_steps(series: list[tuple[float, float]]) -> list[int]:
    """The best step after each of some evaluations, given as gains (proxy, held out)."""
    watch, rows = Watch(), torch.arange(8).repeat_interleave(2)
    base, found = {"proxy": drawn(1, 16), "gold": drawn(2, 16)}, []
    for k, (proxy, gold) in enumerate(series):
        media = drawn(3, 16, 3, 16, 16).sigmoid()
        panel = {"a": base["gold"] + gold * pooled_std(base["gold"], rows)}
        seen = Evaluation(step=k, prompts=rows, proxy=base["proxy"] + proxy, panel=panel, media=media)
        found.append(watch.observe(seen).best_step)
        assert watch.best_step == found[-1]
    return found


def test_the_best_step_never_goes_back_to_one_that_lost_its_protection() -> None:
    series = [(0, 0), (1, 0.6), (2, 0.48), (2.1, 0.48), (2.2, 0.48), (2.3, 0.48), (0.8, 0.68)]
    assert best_steps(series) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seed", range(30))
def test_the_best_step_is_the_one_before_or_the_present_one(seed: int) -> None:
    rng = random.Random(seed)
    steps = best_steps([(0.0, 0.0)] + [(rng.uniform(-1, 3), rng.uniform(-1, 1)) for _ in range(9)])
    kept = 0
    for step, best in enumerate(steps):
        assert best in (kept, step)
        kept = best


def test_held_out_rewards_that_fall_raise_an_alarm_and_name_the_best_step() -> None:
    watch, told = Watch(), []
    for k, level in enumerate((0.0, 0.5, 1.0, 0.2, -0.5, -1.0)):
        panel = {"a": drawn(2, ROWS) + level, "b": 100 * (drawn(3, ROWS) + level)}
        told.append(watch.observe(evaluation(k, base(), k, panel=panel)))
    assert "heldout_drop" in names(told)
    assert told[-1].best_step == 2
    assert told[-1].metrics["hacking_gap"] > 3
    says = next(a.says for v in told for a in v.alarms if a.signature == "heldout_drop")
    assert "held-out rewards" in says
    assert "step 2" in says


def test_held_out_rewards_that_see_nothing_raise_nothing() -> None:
    watch = Watch()
    told = [watch.observe(evaluation(k, base(), k, panel={"a": drawn(50 + k, ROWS)})) for k in range(10)]
    assert not names(told)
    assert told[-1].best_step == 9


def test_rankings_that_contradict_raise_an_alarm() -> None:
    watch, proxy = Watch(), drawn(1, ROWS)
    told = [watch.observe(evaluation(k, base(), panel={"a": proxy * (-1 if k else 1)})) for k in range(3)]
    assert names(told) == {"decorrelated"}
    assert told[-1].metrics["spearman"] == pytest.approx(-1)


def test_transfer_and_gap_are_rules_where_they_are_asked_for() -> None:
    for config, sign in ((WatchConfig(least_transfer=0.05), "no_transfer"), (WatchConfig(most_gap=1), "hacking_gap")):
        watch, gold = Watch(config), {"a": drawn(2, ROWS)}
        assert names([watch.observe(evaluation(k, base(), k, panel=gold)) for k in range(5)]) == {sign}


def test_pictures_that_ignore_the_prompt_are_seen_by_a_tower_and_by_a_reward() -> None:
    following = F.one_hot(PROMPTS, COUNT) + 0.3 * drawn(4, ROWS, COUNT)
    ignoring = following[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    for given in (
        [{"features": f} for f in (following, ignoring, ignoring)],
        [{"prompt_margin": drawn(6, ROWS) + m} for m in (1.0, 0.0, 0.0)],
    ):
        watch = Watch()
        told = [watch.observe(evaluation(k, base(), **more)) for k, more in enumerate(given)]
        assert names(told) == {"prompt_ignored"}


@pytest.mark.parametrize(
    ("figure", "value", "sign"),
    [
        ("ratio_mean", 1.3, "ratio"),
        ("ratio_mean", 0.7, "ratio"),
        ("clip_low", 0.9, "clip_low"),
        ("clip_high", 0.9, "clip_high"),
        ("frac_zero_std", 1.0, "zero_spread"),
        ("grad_norm", 500.0, "gradient"),
    ],
)
def test_updates_that_go_wrong_raise_an_alarm(figure: str, value: float, sign: str) -> None:
    sound = {"ratio_mean": 1.01, "clip_low": 0.2, "clip_high": 0.2, "frac_zero_std": 0.3, "grad_norm": 1.0}
    watch = Watch()
    told = [watch.observe(evaluation(k, base(), training=sound)) for k in range(4)]
    assert not names(told)
    told += [watch.observe(evaluation(4 + k, base(), training=sound | {figure: value})) for k in range(2)]
    assert names(told) == {sign}
    assert told[-1].metrics[figure] == value


def test_a_proxy_that_fails_on_many_pictures_raises_an_alarm() -> None:
    watch, broken = Watch(), torch.where(torch.arange(ROWS) % 2 == 0, math.nan, drawn(1, ROWS))
    told = [watch.observe(evaluation(k, base(), proxy=broken if k else drawn(1, ROWS))) for k in range(3)]
    assert names(told) == {"invalid"}
    assert told[-1].metrics["invalid_judged"] == 0.5
    assert told[-1].metrics["proxy_gain"] == 0


def test_rules_that_are_not_read_raise_nothing_and_are_still_logged() -> None:
    verdicts = run([mixed(base(), HACKS["noise"][0](base()), share) for share in SHARES], WatchConfig(read=("kl",)))
    assert not names(verdicts)
    assert verdicts[-1].metrics["sharpness_outside"] > 0.9


def test_one_sentence_says_what_was_seen_why_and_what_to_do() -> None:
    verdicts = run([mixed(base(), HACKS["over-saturation"][0](base()), share) for share in SHARES])
    alarm = next(a for v in verdicts for a in v.alarms)
    assert re.match(r"\d\d% of the pictures are (garish|full of pixels cut off|over-saturated)", alarm.says)
    for part in ("the proxy gained", "without the prompt being followed", "go back to step 0"):
        assert part in alarm.says
    assert alarm.says.endswith(".")


def test_metrics_are_finite_numbers() -> None:
    blank = torch.full((ROWS, 3, 16, 16), 0.5)
    watch = Watch()
    for k in range(2):
        told = watch.observe(evaluation(k, blank, proxy=torch.ones(ROWS), panel={"a": torch.full((ROWS,), math.nan)}))
        assert all(isinstance(v, float) and math.isfinite(v) for v in told.metrics.values())
    assert not told.alarms


def test_videos_are_watched() -> None:
    videos = torch.stack([base()[:16], base()[16:32]], 1)
    watch = Watch()
    seen = Evaluation(step=0, prompts=PROMPTS[:16], proxy=drawn(1, 16), media=videos)
    watch.observe(seen)
    told = [watch.observe(replace(seen, step=k, media=torch.full_like(videos, 0.5))) for k in (1, 2)]
    assert "flat_high" in names(told)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"proxy": torch.ones(3)}, "evaluation.proxy has 3 rows"),
        ({"panel": {"b": torch.ones(ROWS)}}, r"the panel is \['b'\], but it was \['a'\]"),
        ({"prompts": PROMPTS.flip(0)}, "other prompts than the first"),
        ({"features": torch.ones(ROWS, 2)}, "evaluation.features is given"),
    ],
)
def test_an_evaluation_that_cannot_be_compared_is_refused(change: dict[str, Any], says: str) -> None:
    watch, seen = Watch(), evaluation(0, base(), panel={"a": torch.ones(ROWS)})
    watch.observe(seen)
    with pytest.raises(ConfigError, match=says):
        watch.observe(replace(seen, step=1, **change))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"read": ("truth",)}, "watch.read has 'truth'"),
        ({"patience": 0}, "watch.patience is 0"),
        ({"shift": 0.0}, "watch.shift is 0.0"),
        ({"diversity_floor": 1.0}, "watch.diversity_floor is 1.0"),
        ({"kl_ceiling": 0.0}, "watch.kl_ceiling is 0.0"),
        ({"panel_errors": math.nan}, "watch.panel_errors is nan"),
    ],
)
def test_a_config_that_means_nothing_is_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WatchConfig(**setting)
