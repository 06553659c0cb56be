"""The average of the weights: its closed form, its swap, its resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffalign.errors import ConfigError, ModelError
from diffalign.train.ema import Ema, warm_up


def weights(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 5).to(dtype))


def walk(ema: Ema, weight: nn.Parameter, steps: range, slope: float = 0.1) -> None:
    """Weights that move by `slope` a step."""
    for step in steps:
        weight.data += slope
        ema.update(step)


def test_a_linear_walk_is_followed_at_the_lag_of_the_closed_form():
    weight, d, b, n = weights(), 0.75, 0.125, 40
    start = weight.detach().double().clone()
    ema = Ema([("w", weight)], d, every=1, rule=lambda step, decay: decay)
    walk(ema, weight, range(n), b)
    lag = d / (1 - d) * (1 - d**n) * b  # sum over k < n of d^(k+1) b
    torch.testing.assert_close(ema.state_dict()["w"].double(), start + b * n - lag, rtol=0, atol=1e-5)


def test_weights_that_stand_still_are_their_own_average():
    weight = weights()
    ema = Ema([("w", weight)], 0.9, every=1)
    walk(ema, weight, range(30), slope=0.0)
    assert torch.equal(ema.state_dict()["w"], weight)


def test_the_warm_up_rises_from_a_tenth_to_the_decay():
    assert warm_up(0, 0.9) == 0.1
    assert warm_up(71, 0.9) == 72 / 81  # the last step below 0.9
    assert warm_up(80, 0.9) == 0.9
    rises = [warm_up(k, 0.9) for k in range(100)]
    assert rises == sorted(rises)


def test_only_every_eighth_step_counts():
    weight = weights()
    ema = Ema([("w", weight)], 0.9)
    assert [step for step in range(24) if ema.update(step)] == [7, 15, 23]


def test_the_first_update_takes_the_rule_at_its_step():
    weight = weights()
    start = weight.detach().clone()
    ema = Ema([("w", weight)], 0.9, every=8)
    weight.data += 1
    ema.update(7)
    torch.testing.assert_close(ema.state_dict()["w"], start + 1 - 8 / 17)


def test_a_decay_of_zero_copies_the_weights():
    weight = weights()
    ema = Ema([("w", weight)], 0.0, every=1)
    walk(ema, weight, range(3))
    assert torch.equal(ema.state_dict()["w"], weight)


def test_swapping_shows_the_average_and_puts_the_weights_back_to_the_bit():
    weight = weights()
    ema = Ema([("w", weight)], 0.9, every=1)
    walk(ema, weight, range(5))
    before = weight.detach().clone()
    with ema.swapped():
        assert torch.equal(weight, ema.state_dict()["w"])
        assert not torch.equal(weight, before)
        weight.data += 1  # what happens inside touches neither the average nor the weights
    assert torch.equal(weight, before)
    with ema.swapped():
        assert torch.equal(weight, ema.state_dict()["w"])


def test_an_error_inside_puts_the_weights_back_too():
    weight = weights()
    ema = Ema([("w", weight)], 0.9, every=1)
    walk(ema, weight, range(5))
    before = weight.detach().clone()
    with pytest.raises(RuntimeError), ema.swapped():
        raise RuntimeError
    assert torch.equal(weight, before)


def test_a_backward_pass_after_a_swap_sees_the_weights_of_its_forward():
    weight = weights()
    ema = Ema([("w", weight)], 0.9, every=1)
    walk(ema, weight, range(5))
    loss = (weight**2).sum()
    with ema.swapped():
        pass
    loss.backward()
    assert torch.equal(weight.grad, 2 * weight.detach())


def test_half_precision_weights_are_averaged_in_float32_and_swapped_in_their_own_dtype():
    weight = weights(torch.bfloat16)
    ema = Ema([("w", weight)], 0.99, every=1, rule=lambda step, decay: decay)
    walk(ema, weight, range(3), slope=0.01)
    assert ema.state_dict()["w"].dtype == torch.float32
    with ema.swapped():
        assert weight.dtype == torch.bfloat16


def test_a_resumed_average_equals_the_uninterrupted_one_to_the_bit():
    straight, first = weights(), weights()
    whole, half = Ema([("w", straight)], 0.9, every=2), Ema([("w", first)], 0.9, every=2)
    walk(whole, straight, range(20))
    walk(half, first, range(11))
    resumed = nn.Parameter(first.detach().clone())
    rest = Ema([("w", resumed)], 0.9, every=2)
    rest.load_state_dict(half.state_dict())
    walk(rest, resumed, range(11, 20))
    assert torch.equal(rest.state_dict()["w"], whole.state_dict()["w"])
    assert torch.equal(resumed, straight)


def test_before_the_first_averaging_the_weights_are_what_is_seen():
    weight = weights()
    ema = Ema([("w", weight)], 0.9, every=8)
    walk(ema, weight, range(7))
    before = weight.detach().clone()
    with ema.swapped():
        assert torch.equal(weight, before)
    resumed = Ema([("w", weight)], 0.9, every=8)
    resumed.load_state_dict(ema.state_dict())
    with resumed.swapped():
        assert torch.equal(weight, before)
    assert resumed.update(7)
    again = Ema([("w", weight)], 0.9, every=8)
    again.load_state_dict(resumed.state_dict())
    for each in (resumed, again):
        with each.swapped():
            assert torch.equal(weight, resumed.state_dict()["w"])
            assert not torch.equal(weight, before)


def test_averages_of_another_model_are_refused_by_name():
    ema = Ema([("w", weights())])
    with pytest.raises(ModelError, match="1 missing, such as 'w'; 1 unknown, such as 'v'"):
        ema.load_state_dict({"v": torch.zeros(5)})
    with pytest.raises(ModelError, match="of another shape"):
        ema.load_state_dict({"w": torch.zeros(4)})


@pytest.mark.parametrize(("decay", "every", "says"), [(1.0, 8, "decay is 1.0"), (-0.1, 8, "decay"), (0.9, 0, "every")])
def test_settings_without_an_average_are_refused(decay, every, says):
    with pytest.raises(ConfigError, match=says):
        Ema([("w", weights())], decay, every=every)
