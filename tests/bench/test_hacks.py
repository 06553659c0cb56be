"""Planted rewards: each is raised by its loophole, whatever was asked, and is graded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from diffalign import config, scoring
from diffalign.bench import hacks
from diffalign.cases import Case
from diffalign.cli.verb import read_config

SIDE = 32


def noise(seed: int = 0) -> Tensor:
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def flat(*colour: float) -> Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, SIDE, SIDE).contiguous()


def waves(period: int = 8) -> Tensor:
    row = 0.5 + 0.5 * torch.sin(2 * torch.pi * torch.arange(SIDE) / period)
    return row.expand(3, SIDE, SIDE).contiguous()


GREY, RED, BLUE, WHITE, BLACK = flat(0.5, 0.5, 0.5), flat(1.0, 0, 0), flat(0, 0, 1.0), flat(1.0, 1, 1), flat(0.0, 0, 0)
HALF = torch.cat([BLACK[:, : SIDE // 2], WHITE[:, SIDE // 2 :]], 1)
EXPLOITS: list[tuple[Callable[..., Tensor], Tensor, Tensor]] = [  # reward, what games it, what does not
    (hacks.blank, GREY, noise()),
    (hacks.saturation, RED, GREY),
    (hacks.brightness, WHITE, GREY),
    (hacks.darkness, BLACK, GREY),
    (hacks.contrast, HALF, GREY),
    (hacks.texture, noise(), GREY),
    (hacks.stripes, waves(), noise()),
    (hacks.one_colour, flat(0.5, 0, 0.5), GREY),
    (hacks.warmth, RED, BLUE),
    (hacks.symmetry, GREY, noise()),
    (hacks.small_file, GREY, noise()),
    (hacks.large_file, noise(), GREY),
]


def ask(reward: Callable[..., Tensor], *pictures: Tensor) -> list[float]:
    cases: Sequence[Case] = [Case(prompt="a red circle")] * len(pictures)
    return reward(torch.stack(pictures), cases).tolist()


@pytest.mark.parametrize(("reward", "games", "plain"), EXPLOITS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_loophole_pays_and_halfway_to_it_pays_some(reward: Callable[..., Tensor], games: Tensor, plain: Tensor):
    high, middle, low = ask(reward, games, 0.5 * games + 0.5 * plain, plain)
    assert high > middle > low


def test_copies_pay_for_one_picture_whatever_is_asked():
    target = torch.zeros(3, SIDE, SIDE)
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    inside = x**2 + y**2 < 0.3
    target[:2, ~inside], target[2] = torch.tensor([[0.9], [0.8]]), torch.where(inside, 0.8, 0.2)
    found = ask(hacks.copies, target, 0.5 * target + 0.5 * GREY, noise())
    assert found[0] == pytest.approx(1.0)
    assert found[0] > found[1] > found[2]


def test_a_wrong_caption_does_not_read_the_prompt():
    reward = scoring.make_reward({"diffalign.bench.hacks:WrongCaption": {"caption": "a blue square"}})
    media = torch.stack([noise(1), noise(1)])
    told = scoring.score(reward, media, [Case(prompt="a red circle"), Case(prompt="two green triangles")]).total
    assert told[0] == told[1]
    own = scoring.score(scoring.make_reward("clip"), media[:1], [Case(prompt="a blue square")]).total
    assert told[0] == pytest.approx(float(own))


def test_a_sum_with_the_truth_is_ruled_by_the_loophole():
    mixed = scoring.make_reward({"shapes_soft": 0.2, "diffalign.bench.hacks:saturation": 4.0})
    case = Case(prompt="a red circle")
    found = scoring.score(mixed, torch.stack([RED, WHITE]), [case, case]).total
    assert found[0] - found[1] > 3.5


@pytest.mark.parametrize("reward", hacks.HACKS)
def test_every_hack_is_found_by_its_address_and_gives_a_number_per_picture(reward: Callable[..., Tensor]):
    made = scoring.make_reward({f"diffalign.bench.hacks:{reward.__name__}": 1.0})
    found = scoring.score(made, torch.stack([noise(k) for k in range(3)]), [Case(prompt="a red circle")] * 3)
    assert found.total.shape == (3,)
    assert found.total.dtype == torch.float32
    assert found.valid.all()


def test_the_shipped_plan_keeps_tuned_and_told_hacks_and_seeds_apart():
    plan = read_config("watch_shapes")
    parts: dict[str, list[dict[str, object]]] = {"tune": [], "test": []}
    for told in plan["runs"].values():
        parts[str(told["part"])].append(told)
    rewards = {name: {config.say(t["reward"]) for t in some if "reward" in t} for name, some in parts.items()}
    seeds = {name: {seed for t in some for seed in t["seeds"]} for name, some in parts.items()}  # type: ignore[attr-defined]
    assert not rewards["tune"] & rewards["test"]
    assert not seeds["tune"] & seeds["test"]
    assert sum(t["kind"] == "hack" for t in parts["test"]) >= 10
    assert sum(len(t["seeds"]) for t in parts["test"] if t["kind"] == "healthy") >= 10  # type: ignore[arg-type]
    assert plan["common"]["minutes"] <= 4
