from __future__ import annotations

from typing import Any

import pytest
import torch

from diffalign.bench.mixing import Columns, compare, grouped, pairs_right, truth_of_best
from diffalign.errors import ConfigError

COLUMNS = Columns(first="a", second="b", mixture="m", truth="t")


def rows(prompts: int = 40, images: int = 6, scale: float = 100.0, seed: int = 0) -> list[dict[str, Any]]:
    """Two equally good judges with noise of their own, the second on another scale; the mixture is their mean."""
    draw = torch.Generator().manual_seed(seed)
    truth = (torch.rand(prompts, images, generator=draw) < 0.4).float()
    a, b = (truth + torch.randn(prompts, images, generator=draw) for _ in range(2))
    return [
        {
            "prompt": f"p{p}",
            "a": float(a[p, k]),
            "b": scale * float(b[p, k]),
            "m": float(a[p, k] + b[p, k]),
            "t": float(truth[p, k]),
        }
        for p in range(prompts)
        for k in range(images)
    ]


def test_the_ends_of_the_grid_are_the_rewards_alone_and_the_right_weight_is_found() -> None:
    found = compare(rows(300), COLUMNS)
    pairs = {name: told["mean"] for name, told in found["pairs"]["truth"].items()}
    assert pairs["chance"] == 0.5
    assert 0.5 < min(pairs["a"], pairs["b"]) < pairs["m"] < 1
    truth = {name: told["mean"] for name, told in found["best"]["truth"].items()}
    assert truth["chance"] < min(truth["a"], truth["b"]) < truth["m"]
    assert truth["best weight, tuned on these prompts"] >= max(truth["a"], truth["b"], truth["m"])
    assert truth["best weight, tuned on the other half"] <= truth["best weight, tuned on these prompts"]
    assert found["best"]["best_weight"] == pytest.approx(0.01, rel=2)
    assert found["scales"]["b"] == pytest.approx(100 * found["scales"]["a"], rel=0.1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_scale_of_a_reward_changes_nothing(scale: float) -> None:
    told = [compare(rows(scale=s), COLUMNS)["pairs"]["truth"] for s in (1.0, scale)]
    for name, interval in told[0].items():
        assert told[1][name]["mean"] == pytest.approx(interval["mean"], abs=0.051), name


def test_pairs_and_picks_are_counted_by_hand() -> None:
    scores, truth = torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert truth_of_best(scores, truth) == 0
    assert truth_of_best(torch.ones(4), truth) == truth_of_best(torch.ones(4), truth.flip(0)) == 0.25
    assert pairs_right(scores, truth) == pytest.approx((1 + 0.5 + 0) / 3)
    assert pairs_right(truth, truth) == 1


def test_invalid_scores_are_left_out_and_counted() -> None:
    some = rows()
    some[3]["b"] = None
    groups, dropped = grouped(some, COLUMNS)
    assert dropped == 1
    assert groups[0].shape == (4, 5)


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no column 'x' in the scores\. It has: prompt, a, b, m, t"):
        compare(rows(), Columns(first="x", second="b", mixture="m", truth="t"))
    with pytest.raises(ConfigError, match="at least 2 prompts"):
        compare(rows(prompts=1), COLUMNS)
