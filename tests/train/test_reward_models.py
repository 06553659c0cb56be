"""Reward models in training: what they learn, what a saved one says, and that nothing of it depends on how it ran."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign import config, own_rewards, registry, scoring
from diffalign.cases import Case
from diffalign.errors import ConfigError, ModelError, OutputError, UnknownName
from diffalign.reward_specs import parse_spec
from diffalign.train import known, steps
from diffalign.train.reward_models import comparisons, looking, raters
from diffalign.train.reward_models.comparisons import Dealer, pairs_of
from diffalign.train.reward_models.learning import Preferences, RewardJob
from diffalign.train.reward_models.settings import RewardConfig
from diffalign.train.reward_models.start import opened, train_reward
from tests.rewards import clips
from tests.train.pairs import both
from tests.train.tiny_runs import rows

WORDS = ("cube", "ball", "tree", "boat", "star", "ring", "lamp", "fish", "leaf", "cup", "hat", "key")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.transformers_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Brighter is better, for 48 prompts of two pictures, one of three and one of two that are as good."""
    folder = tmp_path_factory.mktemp("pairs")
    found, draws = [], torch.Generator().manual_seed(0)
    for k, prompt in enumerate(f"{colour} {word}" for colour in ("red", "blue", "grey", "pale") for word in WORDS):
        shades = torch.randint(20, 235, (3 if k == 0 else 2,), generator=draws).tolist()
        names = [f"{k}-{place}.png" for place in range(len(shades))]
        for name, shade in zip(names, shades, strict=True):
            noise = torch.randint(0, 20, (24, 24, 3), generator=draws, dtype=torch.uint8) + shade
            Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / name)
        order = sorted(shades, reverse=True)
        ranks = [1, 1] if k == 1 else [1 + order.index(shade) for shade in shades]
        found.append({"prompt": prompt, "images": names, "ranks": ranks})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder / "pairs.jsonl"


def settings(clip: Path, pairs: Path, **given: Any) -> RewardConfig:
    told = {
        "model": str(clip),
        "data": {"pairs": [str(pairs)]},
        "steps": 6,
        "batch": 8,
        "micro_batch": 4,
        "evaluate": {"every": 3},
        "optim": {"learning_rate": 1e-3},
        "trackers": [],
    }
    return config.build(RewardConfig, told | given)


def run(out: Path, told: RewardConfig, **more: Any) -> dict[str, Any]:
    return train_reward(told, out=out, say=lambda text: None, **more)


def job(out: Path, told: RewardConfig) -> Any:
    return opened(told, seed=0, out=out, device="cpu", say=lambda text: None)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.rglob("model.safetensors")))


# what is learnt


def test_it_learns_what_is_preferred_and_tells_it_of_new_prompts(clip: Path, data: Path, tmp_path: Path) -> None:
    found = run(tmp_path, settings(clip, data, steps=40, evaluate={"every": 10, "share": 0.3}))
    assert found["after"]["accuracy"]["mean"] > 0.85
    assert found["after"]["loss"]["mean"] < found["before"]["loss"]["mean"] - 0.2
    (reward, _) = parse_spec(str(tmp_path))[0]
    shades = torch.tensor([0.2, 0.5, 0.9])[:, None, None, None].expand(3, 3, 24, 24)
    said = reward(shades, [Case(prompt="a green door")] * 3)
    assert said.total.tolist() == sorted(said.total.tolist())


def test_a_saved_reward_scores_as_the_model_that_was_trained(clip: Path, data: Path, tmp_path: Path) -> None:
    told = settings(clip, data)
    run(tmp_path, told)
    card = own_rewards.read_card(tmp_path / "reward")
    media, prompts = clips.media_of(4, 24), ["red cube", "blue ball", "red cube", "a door"]
    (reward, _) = parse_spec(str(tmp_path))[0]
    said = scoring.score(reward, media, [Case(prompt=p) for p in prompts])
    again = raters.make(replace(told, model=str(tmp_path / "reward" / "clip")), torch.device("cpu"))
    rating = again.rate(list(media), prompts)[:, 0].detach()
    assert torch.allclose(said.parts["rating"], rating, atol=1e-5)
    assert torch.allclose(said.total, (rating - card.mean) / card.deviation, atol=1e-4)


def test_scores_of_held_out_pictures_have_mean_0_and_deviation_1(clip: Path, data: Path, tmp_path: Path) -> None:
    told = settings(clip, data)
    run(tmp_path, told)
    (reward, _) = parse_spec(str(tmp_path))[0]
    from diffalign import vision

    entries = comparisons.read(told).heldout
    pictures = [(p, e.case) for e in entries for p in e.pictures]
    media = torch.cat([vision.to_tensor([p.open()]) for p, _ in pictures])
    said = scoring.score(reward, media, [case for _, case in pictures]).total
    assert float(said.mean()) == pytest.approx(0, abs=1e-3)
    assert float(said.std(correction=0)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "kind",
    ["ties", "uncertain", "best_of_all", *(pytest.param(k, marks=pytest.mark.slow) for k in ("bradley_terry", "pick"))],
)
def test_every_loss_learns(kind: str, clip: Path, data: Path, tmp_path: Path) -> None:
    found = run(tmp_path, settings(clip, data, loss={"kind": kind}, steps=12, evaluate={"every": 12}))
    assert found["after"]["loss"]["mean"] < found["before"]["loss"]["mean"]
    card = own_rewards.read_card(tmp_path / "reward")
    assert card.loss == kind
    (reward, _) = parse_spec(str(tmp_path))[0]
    said = reward(clips.media_of(2, 24), [Case(prompt="red cube")] * 2)
    assert ("doubt" in said.parts) == (kind == "uncertain")
    if kind == "uncertain":
        assert bool((said.parts["doubt"] > 0).all())


def test_only_open_layers_learn(clip: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path, settings(clip, data, freeze=0.5, steps=3))
    before, after = load_file(clip / "model.safetensors"), weights_of(tmp_path / "reward")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("layers.0." in name or "embed" in name for name in moved)
    assert any("vision_model.encoder.layers.1." in name for name in moved)
    assert any("text_model.encoder.layers.1." in name for name in moved)


def test_a_model_of_open_clip_stays_one(data: Path, tmp_path: Path) -> None:
    import open_clip

    run(tmp_path / "out", settings(clips.open_clip_folder(tmp_path / "own"), data, steps=3))
    place = tmp_path / "out" / "reward" / "clip"
    stock, _ = open_clip.create_model_from_pretrained(f"local-dir:{place}")
    state = load_file(place / "open_clip_model.safetensors")
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in state.items())
    (reward, _) = parse_spec(str(tmp_path / "out"))[0]
    assert bool(reward(clips.media_of(2), [Case(prompt="red cube")] * 2).total.isfinite().all())


@pytest.mark.slow
def test_a_vision_language_model_learns_a_lora_and_a_head(data: Path, tmp_path: Path) -> None:
    told = settings(Path("shapes-vlm"), data, tower="vlm", rank=4, steps=2, batch=4, name="seen", freeze=0.0)
    found = run(tmp_path, told)
    assert found["reward"] == "seen"
    (reward, _) = parse_spec("seen")[0]
    assert not reward.differentiable
    media, prompts = clips.media_of(3, 32), ["red cube", "blue ball", "a door"]
    with job(tmp_path / "again", told) as again:
        from diffalign.train import checkpoint

        again.trained.load_state_dict(
            checkpoint.load(tmp_path / f"checkpoints/step-{found['chosen']}").state["trained"]
        )
        rating = again.rater.rate(list(media), prompts)[:, 0].detach()
    said = scoring.score(reward, media, [Case(prompt=p) for p in prompts])
    assert torch.allclose(said.parts["rating"], rating, atol=1e-4)
    assert said.parts["rating"].std() > 0


# that nothing depends on how it ran


def gradients(told: RewardConfig, out: Path, *, step: int = 0) -> list[torch.Tensor]:
    with job(out, told) as one:
        teaches = Preferences(one)
        for part in teaches.collect(one, step).micros:
            teaches.learn(one, part, 1.0)
        return [p.grad.clone() for p in one.trained.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["bradley_terry", "uncertain", "best_of_all"])
def test_small_batches_add_up_to_large_ones(kind: str, clip: Path, data: Path, tmp_path: Path) -> None:
    told = settings(clip, data, loss={"kind": kind})
    whole, parts = (gradients(replace(told, micro_batch=size), tmp_path) for size in (8, 1))
    assert all(torch.allclose(a, b, atol=1e-5 * float(a.abs().max() + 1)) for a, b in zip(whole, parts, strict=True))


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_weights_and_metrics(
    clip: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = settings(clip, data, loss={"kind": "uncertain"}, ema=0.9, evaluate={"every": 1}, patience=4, keep=1, steps=9)
    start, judge = raters.make(told, torch.device("cpu")).state_dict(), looking.judge

    def worse(job: RewardJob) -> dict[str, Any]:
        """The further from the start, the worse."""
        now = job.trained.state_dict()
        return judge(job) | {"heldout_loss": float(sum((now[n] - start[n]).abs().sum() for n in start))}

    monkeypatch.setattr(looking, "judge", worse)
    assert "no lower loss" in run(tmp_path / "whole", told)["ended"]
    real, calls = steps.Steps._one_step, [0]

    def killed(self: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return real(self)

    monkeypatch.setattr(steps.Steps, "_one_step", killed)
    with pytest.raises(Killed):
        run(tmp_path / "parts", told)
    assert "no lower loss" in run(tmp_path / "parts", told)["ended"]
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()
    one, two = weights_of(tmp_path / "whole/reward"), weights_of(tmp_path / "parts/reward")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_two_processes_are_one(clip: Path, data: Path, tmp_path: Path) -> None:
    told = settings(clip, data, optim={"learning_rate": 1e-3, "epsilon": 1e-2}, steps=3)
    run(tmp_path / "one", told)
    assert both(lambda rank: run(tmp_path / "two", told), tmp_path / "log") == [0, 0]
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        same = {name for name in one if name not in ("right",)}
        assert all(one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4) for name in same)
    first, second = weights_of(tmp_path / "one/reward"), weights_of(tmp_path / "two/reward")
    assert all(torch.allclose(value, second[name], atol=1e-5) for name, value in first.items())


# when it ends


def test_it_stops_when_held_out_prompts_gain_no_more_and_keeps_the_best(
    clip: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.7, 0.5, 0.6, 0.55, 0.4])
    real = looking.judge

    def told(job: RewardJob) -> dict[str, Any]:
        return real(job) | {"heldout_loss": next(losses, 0.4)}

    monkeypatch.setattr(looking, "judge", told)
    found = run(tmp_path, settings(clip, data, evaluate={"every": 1}, patience=2, steps=9))
    assert found["steps"] == 3
    assert found["chosen"] == 1
    assert "no lower loss" in found["ended"]
    assert (tmp_path / "checkpoints/step-1").is_dir()


def test_the_best_weights_are_saved_though_the_last_are_worse(
    clip: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, real = iter([0.7, 0.3, 0.6]), looking.judge
    monkeypatch.setattr(looking, "judge", lambda job: real(job) | {"heldout_loss": next(losses)})
    found = run(tmp_path, settings(clip, data, evaluate={"every": 1}, steps=2))
    assert found["chosen"] == 1
    kept = load_file(tmp_path / "checkpoints/step-1/state.safetensors")
    after = weights_of(tmp_path / "reward")
    name = next(n for n in after if n.endswith("visual_projection.weight"))
    assert any(torch.equal(value, after[name]) for value in kept.values() if value.shape == after[name].shape)


@given(st.floats(0.2, 8), st.floats(0.55, 0.98))
def test_the_temperature_makes_chances_of_scores(gap: float, right: float) -> None:
    many = 1_000
    leads = [gap] * round(many * right) + [-gap] * round(many * (1 - right))
    share = round(many * right) / len(leads)
    assert looking.temperature(leads) == pytest.approx(gap / math.log(share / (1 - share)), rel=1e-2)


def test_the_temperature_goes_with_the_scores_and_is_never_certain() -> None:
    leads = [1e-5] * 80 + [-1e-5] * 20
    assert looking.temperature(leads) == pytest.approx(1e-5 / math.log(4), rel=0.05)
    assert looking.temperature([1.0] * 10) > 0.25
    assert looking.temperature([0.0] * 5) == 1.0


# what it learns from


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(0, 3))
def test_pairs_are_all_there_once_and_ties_are_told(scores: list[int], near: int) -> None:
    found = pairs_of(scores, near, ties=True)
    assert len(found) == len(scores) * (len(scores) - 1) // 2
    for i, j, label in found:
        gap = scores[i] - scores[j]
        assert label == (0.5 if gap == 0 or abs(gap) < near else float(gap > 0))
    assert pairs_of(scores, near) == [pair for pair in found if pair.label != 0.5]


def test_a_prompt_weighs_the_same_however_many_pairs_it_has(clip: Path, data: Path) -> None:
    told = settings(clip, data)
    split = comparisons.read(told)
    entries = [*split.train, *split.heldout]
    dealer = Dealer(entries, told, 0)
    large = next(each for each in entries if len(each.pictures) == 3)
    small = next(each for each in entries if len(each.pictures) == 2)
    for entry, count in ((large, 3), (small, 1)):
        made = dealer.batch([(entry, list(range(len(entry.pictures))))], pixels=False)
        assert len(made.weights) == count
        assert sum(made.weights) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["bradley_terry", "best_of_all"])
def test_a_long_ranking_weighs_as_a_pair_does_on_average(kind: str, clip: Path, data: Path) -> None:
    told = settings(clip, data, loss={"kind": kind}, pictures=4)
    pair = comparisons.read(told).train[0]
    long = replace(
        pair, case=Case(prompt="long"), pictures=pair.pictures[:1] * 16, scores=tuple(float(k) for k in range(16))
    )
    dealer = Dealer([pair, long], told, 0)
    for entry in (pair, long):
        places = list(range(min(4, len(entry.pictures))))
        made = dealer.batch([(entry, places)], pixels=False)
        assert sum(made.entry_weights if kind == "best_of_all" else made.weights) == pytest.approx(1)


def test_ties_count_only_where_the_loss_has_them(clip: Path, data: Path) -> None:
    def all_of(kind: str) -> list[Any]:
        split = comparisons.read(settings(clip, data, loss={"kind": kind}))
        return [*split.train, *split.heldout]

    assert "red ball" in {each.case.prompt for each in all_of("ties")}
    assert "red ball" not in {each.case.prompt for each in all_of("bradley_terry")}


def test_no_prompt_is_on_both_sides_and_the_split_is_that_of_every_run(clip: Path, data: Path) -> None:
    one, two = comparisons.read(settings(clip, data)), comparisons.read(settings(clip, data))
    names = [{each.case.prompt for each in side} for side in (one.train, one.heldout)]
    assert not names[0] & names[1]
    assert names[1] == {each.case.prompt for each in two.heldout}


def test_a_held_out_file_that_shares_prompts_or_pictures_is_refused(clip: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="held-out prompts are trained on too"):
        comparisons.read(settings(clip, data, evaluate={"pairs": [str(data)]}))
    for file in data.parent.glob("*.png"):
        shutil.copy(file, tmp_path)
    renamed = [{**json.loads(row), "prompt": f"other {k}"} for k, row in enumerate(data.read_text().splitlines())]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    with pytest.raises(ConfigError, match="held-out entries show pictures that are trained on too"):
        comparisons.read(settings(clip, data, evaluate={"pairs": [str(tmp_path / "other.jsonl")]}))


def test_the_default_split_judges_by_no_picture_that_teaches(clip: Path, data: Path, tmp_path: Path) -> None:
    for file in data.parent.glob("*.png"):
        shutil.copy(file, tmp_path)
    lines = [json.loads(row) for row in data.read_text().splitlines()]
    twice = [*lines, *({**row, "prompt": f"another {row['prompt']}"} for row in lines)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
    with pytest.warns(UserWarning, match="trained on under other prompts"):
        split = comparisons.read(settings(clip, tmp_path / "twice.jsonl", evaluate={"share": 0.4}))
    seen = {known.content(p) for each in split.train for p in each.pictures}
    assert not seen & {known.content(p) for each in split.heldout for p in each.pictures}


def test_a_broken_picture_is_told_before_anything_runs(clip: Path, data: Path, tmp_path: Path) -> None:
    for file in data.parent.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "7-0.png").write_bytes((tmp_path / "7-0.png").read_bytes()[:40])
    with pytest.raises(ConfigError, match="cannot be read as a picture"):
        run(tmp_path / "out", settings(clip, tmp_path / "pairs.jsonl"))


def test_other_data_on_resume_is_refused(clip: Path, data: Path, tmp_path: Path) -> None:
    for file in data.parent.iterdir():
        shutil.copy(file, tmp_path)
    told = settings(clip, tmp_path / "pairs.jsonl", steps=2, evaluate={"every": 1})
    run(tmp_path / "out", told)
    kept = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(kept[:-3]))
    with pytest.raises(ConfigError, match="not what this run began with"):
        run(tmp_path / "out", replace(told, steps=3))
    run(tmp_path / "out", replace(told, steps=3, force=True))


def test_a_place_that_cannot_be_written_is_told_first(
    clip: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/mine.txt").write_text("x")
    with pytest.raises(OutputError, match="holds other files"):
        run(tmp_path, settings(clip, data))
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DIFFALIGN_REWARDS", str(tmp_path / "file/names"))
    with pytest.raises(OutputError, match="Set DIFFALIGN_REWARDS"):
        run(tmp_path / "out", settings(clip, data, name="mine"))


def test_a_picture_that_is_missing_is_told_before_anything_runs(clip: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(data, tmp_path / "pairs.jsonl")
    with pytest.raises(ConfigError, match="are missing"):
        run(tmp_path / "out", settings(clip, tmp_path / "pairs.jsonl"))
    assert not (tmp_path / "out").exists()


# the result


def test_a_gradient_reaches_the_picture(clip: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path, settings(clip, data, steps=1))
    (reward, _) = parse_spec(str(tmp_path))[0]
    media = clips.media_of(2).requires_grad_()
    (slope,) = torch.autograd.grad(reward(media, [Case(prompt="red cube")] * 2).total.sum(), media)
    assert float(slope.abs().sum()) > 0
    assert reward.differentiable


def test_a_result_that_moved_says_the_same_and_is_cached_the_same(clip: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", settings(clip, data, steps=1))
    (one, _) = parse_spec(str(tmp_path / "a"))[0]
    before = one.version, one.options
    shutil.move(tmp_path / "a/reward", tmp_path / "b")
    (two, _) = parse_spec(str(tmp_path / "b"))[0]
    assert (two.version, two.options) == before


def test_a_name_is_known_to_everything_that_takes_rewards(clip: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path, settings(clip, data, name="my_taste", steps=1))
    ((reward, weight),) = parse_spec("my_taste:2.0")
    assert (reward.name, weight) == ("my_taste", 2.0)
    assert parse_spec({"mine": {"reward": "my_taste", "weight": 3}})[0][0].name == "mine"
    listed = {info.name: info for info in registry.rewards()}
    assert "pairs of" in listed["my_taste"].meaning
    with pytest.raises(ConfigError, match="Drop the option model"):
        parse_spec({"my_taste": {"model": "other"}})
    with pytest.raises(UnknownName, match="my_taste"):
        parse_spec("my_tast")
    shutil.rmtree(tmp_path / "reward")
    with pytest.raises(ModelError, match=r"there is no reward\.json any more"):
        parse_spec("my_taste")


def test_exchanged_weights_are_found_out(clip: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path, settings(clip, data, steps=1))
    file = tmp_path / "reward/clip/model.safetensors"
    state = load_file(file)
    save_file({name: value + 1 for name, value in state.items()}, file, metadata={"format": "pt"})
    (reward, _) = parse_spec(str(tmp_path))[0]
    with pytest.raises(ModelError, match="not those of its card"):
        reward(clips.media_of(1), [Case(prompt="red cube")])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "clip"}, "name of a reward that is there already"),
        ({"name": "a b"}, "letters, digits"),
        ({"data": {}}, "has no data"),
        ({"loss": {"kind": "ties", "soft": True}}, "takes no shares"),
        ({"loss": {"k": 1.0}}, "k is above 1"),
        ({"batch": 0}, "at least 1"),
        ({"pictures": 1}, "at least 2"),
        ({"freeze": 1.0}, r"\[0, 1\)"),
        ({"tower": "vlm", "instruction": "how good?"}, "where the prompt goes"),
        ({"instruction": "rate {prompt}"}, "a clip is asked nothing"),
        ({"evaluate": {"share": 1.0}}, "between 0 and 1"),
        ({"min_confidence": 2.0}, "share of voters"),
    ],
)
def test_settings_without_sense_are_refused(given: dict[str, Any], says: str, clip: Path, data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, settings(clip, data, **given))


def test_a_card_that_was_changed_is_refused(clip: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path, settings(clip, data, steps=1))
    file = tmp_path / "reward/reward.json"
    told = json.loads(file.read_text())
    own_rewards.remember("broken", tmp_path / "reward")
    wrongs: list[dict[str, Any]] = [{"deviation": 0}, {"tower": "gan"}, {"mean": None}, {"mean": math.nan}]
    for wrong in [*wrongs, {"temperature": -1}]:
        file.write_text(json.dumps(told | wrong))
        with pytest.raises(ModelError, match="cannot be"):
            parse_spec(str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be"):
        assert "clip" in {info.name for info in registry.rewards()}
    file.write_text(json.dumps(told | {"accuracy": {}}))
    assert parse_spec("broken")[0][0].version
    file.write_text(json.dumps(told | {"doubts": True}))
    assert parse_spec("broken")[0][0].version != f"1 {own_rewards.read_card(tmp_path / 'reward').weights}"
    file.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ModelError, match="lacks base"):
        parse_spec(str(tmp_path))
    file.write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        parse_spec(str(tmp_path))
