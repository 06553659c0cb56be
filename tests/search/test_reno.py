"""ReNO on chains whose optimum is known: an identity generator, a linear reward, and the chi law of the noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from diffalign.budget import Limits
from diffalign.errors import BudgetError, ConfigError, NotDifferentiable
from diffalign.search import noise_prior
from diffalign.search.reno import RenoConfig, RenoResult, optimise
from tests.search.toys import ToyChain, gaussian_chain, judge_of

D = 64
G = torch.full((D,), 0.3 / math.sqrt(D))  # a reward gradient of length 0.3
STAR = 31.9706  # (c + sqrt(c^2 + 4 (d - 1))) / 2 with c = 0.3 / 0.01 and d = 64


def one_step(**options: object) -> ToyChain:
    """The image is the noise."""
    return ToyChain(lambda x, alpha, sigma: x, steps=1, width=D, **options)  # type: ignore[arg-type]


def along(media: Tensor, rows: Sequence[int]) -> Tensor:
    return (media * G).sum(1)


def bowl(media: Tensor, rows: Sequence[int]) -> Tensor:
    """Best at 1 everywhere, and dampened, so that some cases stop improving."""
    return -0.01 * ((media - 1) ** 2).sum(1)


def run(rate: object, *, cases: int = 1, seed: int = 0, budget: object = None, **config: object) -> RenoResult:
    chain = one_step(cases=cases, seed=seed, budget=budget)
    return optimise(chain, judge_of(chain, rate), RenoConfig(**config))  # type: ignore[arg-type]


def walked(rate: object, **options: object) -> tuple[list[Tensor], RenoResult]:
    """Every noise of a run of one case, as its image shows it."""
    seen: list[Tensor] = []

    def watched(media: Tensor, rows: Sequence[int]) -> Tensor:
        seen.append(media.detach()[0].clone())
        return rate(media, rows)  # type: ignore[operator]

    return seen, run(watched, **options)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("d", [2, 16, 64])
def test_the_written_gradient_is_that_of_the_penalty_and_points_along_the_noise(d: int) -> None:
    noise = torch.randn(5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)).requires_grad_()
    (found,) = torch.autograd.grad(noise_prior.penalty(noise_prior.lengths(noise), d).sum(), noise)
    wanted = noise_prior.slope(noise.detach())
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    cosine = torch.cosine_similarity(wanted, noise.detach(), dim=1).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-9, rtol=0)


def test_the_gradient_vanishes_at_the_typical_length_and_curves_by_two() -> None:
    direction = torch.nn.functional.normalize(torch.arange(1.0, D + 1, dtype=torch.float64), dim=0)
    typical = noise_prior.typical_length(D) * direction
    assert float(noise_prior.slope(typical[None]).abs().max()) < 1e-12
    beyond = noise_prior.slope(((noise_prior.typical_length(D) + 1e-5) * direction)[None])[0]
    assert float(beyond @ direction) / 1e-5 == pytest.approx(2.0, rel=1e-4)
    assert [round(noise_prior.typical_length(d), 3) for d in (16384, 65536)] == [127.996, 255.998]


@pytest.mark.parametrize("d", [2, 16, 64])
def test_the_length_has_a_density_and_the_penalty_is_its_negative_log(d: int) -> None:
    length = torch.linspace(1e-6, 30, 200_001, dtype=torch.float64)
    density = noise_prior.log_density(length, d)
    assert float(torch.trapezoid(density.exp(), length)) == pytest.approx(1.0, abs=1e-6)
    constant = noise_prior.penalty(length, d) + density
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), atol=1e-9, rtol=0)


def test_the_excess_is_the_penalty_above_its_lowest_value() -> None:
    lowest = noise_prior.penalty(torch.tensor(math.sqrt(D - 1), dtype=torch.float64), D)
    for length in (0.5, 7.9, 8.0, 40.0):
        above = float(noise_prior.penalty(torch.tensor(length, dtype=torch.float64), D) - lowest)
        assert noise_prior.excess(length, D) == pytest.approx(above, abs=1e-9)


def test_the_length_of_half_precision_noise_is_formed_in_float32() -> None:
    noise = torch.full((2, 65536), 300.0, dtype=torch.float16)  # squares overflow half precision
    torch.testing.assert_close(noise_prior.lengths(noise), torch.full((2,), 76800.0), atol=0, rtol=1e-3)


def test_without_reward_only_the_length_moves_and_it_goes_to_the_typical_one() -> None:
    for scale in (0.3, 3.0):
        chain = one_step(cases=3)
        start = scale * chain.noise(chain.seeds, [0, 1, 2])
        images: list[Tensor] = []

        def nothing(media: Tensor, rows: Sequence[int], seen: list[Tensor] = images) -> Tensor:
            seen.append(media.detach().clone())
            return 0 * media.sum(1)

        judge = judge_of(chain, nothing)
        config = RenoConfig(iterations=100, learning_rate=4.0, momentum=0.0, clip=0.0)
        found = optimise(chain, judge, config, noise=start)
        ways = [torch.nn.functional.normalize(x, dim=1) for x in images]
        assert all(float((way - ways[0]).abs().max()) < 1e-5 for way in ways)
        gap = (found.norms - math.sqrt(D - 1)).abs()
        assert bool((gap.diff(dim=0) <= 1e-5).all())
        assert float(gap[-1].max()) < 0.02
        assert torch.equal(found.noise, start)  # rewards tie, so the plain image stays the best
        assert judge.constant


@pytest.mark.parametrize(
    ("optimizer", "rate", "iterations", "close"),
    [("sgd", 5.0, 300, 1e-3), ("adam", 0.5, 300, 1e-2), ("lbfgs", 1.0, 80, 1e-2)],
)
def test_the_linear_toy_ends_at_the_known_length_and_direction(
    optimizer: str, rate: float, iterations: int, close: float
) -> None:
    seen, found = walked(along, optimizer=optimizer, learning_rate=rate, iterations=iterations)
    last = found.norms[~found.norms.isnan()][-1]
    assert float(last) == pytest.approx(STAR, abs=close)
    assert float(torch.cosine_similarity(seen[-1], G, dim=0)) > 1 - 1e-5
    assert found.ended[0] in ("iterations", "converged")


@pytest.mark.parametrize(
    ("config", "stock"),
    [
        ({}, lambda x: torch.optim.SGD([x], lr=5.0, momentum=0.9, nesterov=True)),
        ({"nesterov": False}, lambda x: torch.optim.SGD([x], lr=5.0, momentum=0.9)),
        ({"momentum": 0.0}, lambda x: torch.optim.SGD([x], lr=5.0)),
        ({"optimizer": "adam", "learning_rate": 0.3}, lambda x: torch.optim.Adam([x], lr=0.3, eps=1e-2)),
    ],
)
def test_the_updates_are_those_of_torch(
    config: dict[str, object], stock: Callable[[Tensor], torch.optim.Optimizer]
) -> None:
    seen, _ = walked(along, iterations=8, clip=0.0, **config)
    x = seen[0].clone()
    optimizer = stock(x)
    for image in seen[1:]:
        x.grad = 0.01 * (1 - (D - 1) / float(x.norm()) ** 2) * x - G
        optimizer.step()
        torch.testing.assert_close(image, x, atol=1e-4, rtol=1e-4)


def test_the_clip_bounds_every_step_of_the_noise() -> None:
    seen, _ = walked(along, iterations=40)
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(seen)]
    bounds = [5.0 * 0.1 * (1 + 0.9 * (1 - 0.9 ** (k + 1)) / 0.1) for k in range(39)]
    assert steps[0] == pytest.approx(0.95, rel=1e-4)
    assert all(step <= bound * (1 + 1e-5) for step, bound in zip(steps, bounds, strict=True))
    assert bounds[-1] < 5.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_k_images_cost_k_generations_and_one_update_less(optimizer: str) -> None:
    chain = one_step(cases=2)
    judge = judge_of(chain, along)
    found = optimise(chain, judge, RenoConfig(iterations=7, optimizer=optimizer, learning_rate=0.5))
    assert chain.calls == [(0, 2)] * 7
    assert chain.budget.nfe == 2 * (7 + 2 * 6)
    assert (chain.budget.decodes, chain.budget.reward_calls) == (14, 14)
    assert [len(leaves) for leaves in judge.leaves] == [7, 7]
    assert found.rewards.shape == found.norms.shape == (7, 2)
    assert found.ended == ("iterations", "iterations")


def test_the_best_never_falls_and_begins_with_the_plain_image() -> None:
    chain = one_step(cases=2, seed=3)
    judge = judge_of(chain, bowl)
    found = optimise(chain, judge, RenoConfig(iterations=30, learning_rate=60.0, clip=0.0))
    plain = bowl(chain.noise(chain.seeds, [0, 1]), [0, 1])
    assert torch.equal(found.first, plain)
    assert torch.equal(found.best, found.rewards.max(0).values)
    assert torch.equal(found.best, judge.best_reward())
    assert bool((found.best >= found.first).all())
    means = [mean for _, _, mean in judge.curve]
    assert means == sorted(means)
    assert torch.equal(bowl(found.noise, [0, 1]), found.best)  # the noise returned is the noise of the best
    assert judge.leaves[0][0].seed == chain.seeds[0]
    assert judge.leaves[0][1].seed is None


def test_an_image_that_the_regulariser_dislikes_still_wins_by_its_reward() -> None:
    chain = one_step()
    start = (4.0 * torch.nn.functional.normalize(G, dim=0))[None]
    weak = G / 30  # length 0.01
    config = RenoConfig(iterations=2, learning_rate=157.0, momentum=0.0, clip=0.0)
    found = optimise(chain, judge_of(chain, lambda m, rows: (m * weak).sum(1)), config, noise=start)
    disliked = 0.01 * noise_prior.penalty(found.norms[:, 0], D) - found.rewards[:, 0]
    assert float(disliked[1]) > float(disliked[0]) + 1
    assert float(found.rewards[1, 0]) > float(found.rewards[0, 0])
    assert float(found.best) == float(found.rewards[1, 0])
    assert float(found.noise.norm()) > 20


def test_adding_a_constant_to_the_reward_changes_nothing() -> None:
    for optimizer in ("sgd", "adam"):
        plain = run(along, iterations=8, optimizer=optimizer, learning_rate=0.5)
        raised = run(lambda media, rows: along(media, rows) + 4.0, iterations=8, optimizer=optimizer, learning_rate=0.5)
        assert same(plain.norms, raised.norms)
        assert torch.equal(plain.noise, raised.noise)


@pytest.mark.parametrize(
    "config",
    [
        {"iterations": 12},
        {"iterations": 12, "optimizer": "adam", "learning_rate": 0.2},
        {"iterations": 25, "optimizer": "lbfgs", "learning_rate": 1.0},
        {"iterations": 40, "learning_rate": 40.0, "clip": 0.0, "patience": 2},
        {"iterations": 6, "warm_start": 4},
    ],
)
def test_prompts_optimised_together_end_where_they_end_alone(config: dict[str, object]) -> None:
    together = run(bowl, cases=3, **config)
    for k in range(3):
        alone = run(bowl, seed=1000 * k, **config)
        assert same(together.rewards[:, k], alone.rewards[:, 0])
        assert same(together.norms[:, k], alone.norms[:, 0])
        assert torch.equal(together.noise[k], alone.noise[0])
        assert together.ended[k] == alone.ended[0]
        assert torch.equal(together.first[k], alone.first[0])


def test_seeds_repeat_bit_for_bit() -> None:
    a, b = (run(along, cases=2, iterations=9, warm_start=3) for _ in range(2))
    assert torch.equal(a.rewards, b.rewards)
    assert torch.equal(a.noise, b.noise)
    assert not torch.equal(a.noise, run(along, cases=2, seed=1, iterations=9, warm_start=3).noise)


class HalfChain(ToyChain):
    """A model in bfloat16."""

    def noise(self, seeds: Sequence[int], rows: Sequence[int]) -> Tensor:
        return super().noise(seeds, rows).bfloat16()

    def generate(self, x: Tensor, rows: Sequence[int], *, grad: bool = False) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.bfloat16
        return super().generate(x, rows, grad=grad)


def test_updates_too_small_for_half_precision_add_up_in_the_master_noise() -> None:
    chain = HalfChain(lambda x, alpha, sigma: x, steps=1, width=D)
    start = torch.ones(1, D)  # bfloat16 steps by 0.0078 above 1, each update is 0.0005
    config = RenoConfig(iterations=41, learning_rate=0.04, momentum=0.0, regularise=0.0)
    found = optimise(chain, judge_of(chain, lambda m, rows: m.float().sum(1)), config, noise=start)
    assert found.noise.dtype == torch.float32
    assert float(found.norms[-1, 0]) == pytest.approx(8.0 + 40 * 0.04 * 0.1, abs=1e-3)
    assert float(found.rewards[-1, 0]) > float(found.first)
    plain = optimise(chain, judge_of(chain, along), RenoConfig(iterations=1))
    assert torch.equal(plain.noise, chain.noise([0], [0]).float())


def test_a_case_that_stops_improving_leaves_the_batch() -> None:
    def flat_for_the_first(media: Tensor, rows: Sequence[int]) -> Tensor:
        grows = torch.tensor([float(row) for row in rows])
        return grows * along(media, rows)

    chain = one_step(cases=2)
    judge = judge_of(chain, flat_for_the_first)
    found = optimise(chain, judge, RenoConfig(iterations=10, patience=3))
    assert found.ended == ("patience", "iterations")
    assert chain.calls == [(0, 2)] * 4 + [(0, 1)] * 6
    assert found.rewards[:, 0].isnan().tolist() == [False] * 4 + [True] * 6
    assert chain.budget.nfe == 2 * 4 + 6 + 2 * (2 * 4 + 5)
    assert torch.equal(found.noise[0], chain.noise(chain.seeds, [0, 1])[0])


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_an_invalid_reward_ends_its_case_with_the_best_so_far(optimizer: str) -> None:
    count = {0: 0, 1: 0}

    def breaks(media: Tensor, rows: Sequence[int]) -> Tensor:
        found = along(media, rows).clone()
        for k, row in enumerate(rows):
            count[row] += 1
            if row == 0 and count[row] == 3:
                found[k] = math.nan
        return found

    chain = one_step(cases=2)
    judge = judge_of(chain, breaks)
    found = optimise(chain, judge, RenoConfig(iterations=8, optimizer=optimizer))
    alone = run(along, seed=1000, iterations=8, optimizer=optimizer)
    assert found.ended[0] == "invalid reward"
    assert found.rewards[:, 0].isnan().tolist() == [False, False] + [True] * 6
    assert float(found.best[0]) == float(found.rewards[:2, 0].max())
    assert sum(math.isnan(leaf.reward) for leaf in judge.leaves[0]) == 1
    assert same(found.rewards[:, 1], alone.rewards[:, 0])  # its neighbour never notices


def test_a_reward_that_is_never_valid_returns_the_start() -> None:
    chain = one_step(cases=2)
    found = optimise(chain, judge_of(chain, lambda m, rows: m.sum(1) * math.nan), RenoConfig(warm_start=3))
    assert found.ended == ("invalid reward",) * 2
    assert bool(found.best.isnan().all())
    assert torch.equal(found.noise, chain.noise(chain.seeds, [0, 1]))
    assert len(chain.calls) == 4  # three draws and the first look; no backward pass
    assert chain.budget.nfe == 8


def test_an_infinite_gradient_ends_its_case_before_it_moves() -> None:
    def cliff(media: Tensor, rows: Sequence[int]) -> Tensor:
        edges = [
            (0 * image[0]).abs().sqrt() if row == 0 else image.new_zeros(())
            for image, row in zip(media, rows, strict=True)
        ]
        return along(media, rows) + torch.stack(edges)  # an edge is worth 0 and has no slope

    found = run(cliff, cases=2, iterations=5)
    assert found.ended == ("invalid gradient", "iterations")
    assert int((~found.rewards[:, 0].isnan()).sum()) == 1
    assert same(found.rewards[:, 1], run(along, seed=1000, iterations=5).rewards[:, 0])


def test_a_reward_without_a_gradient_says_what_to_use_instead() -> None:
    with pytest.raises(NotDifferentiable, match=r"tree=, smc= or best_of_n="):
        run(lambda media, rows: along(media, rows).detach())
    apart = torch.ones(1, requires_grad=True)
    with pytest.raises(NotDifferentiable, match="without one to the noise"):
        run(lambda media, rows: along(media, rows).detach() * apart)
    assert float(run(lambda media, rows: along(media, rows).detach(), iterations=1).best) != 0  # nothing to climb


def test_an_interrupt_passes_through_and_the_judge_keeps_the_best() -> None:
    chain = one_step()
    judge = judge_of(chain, along)
    judge.on_improve = lambda leaf: (_ for _ in ()).throw(KeyboardInterrupt) if leaf.number == 3 else None
    with pytest.raises(KeyboardInterrupt):
        optimise(chain, judge, RenoConfig())
    assert judge.best[0][0].number == 3


def test_a_warm_start_is_best_of_n_and_begins_with_the_plain_sampler() -> None:
    chain = one_step(cases=800)
    judge = judge_of(chain, lambda media, rows: media[:, 0])
    found = optimise(chain, judge, RenoConfig(iterations=1, warm_start=4))
    assert torch.equal(found.first, chain.noise(chain.seeds, range(800))[:, 0])
    spread = float(found.best.std()) / math.sqrt(800)
    assert float(found.best.mean()) == pytest.approx(1.029375, abs=3 * spread)  # the mean maximum of 4 normals
    assert torch.equal(found.best, found.rewards[0])
    draws = torch.tensor([[leaf.reward for leaf in leaves] for leaves in judge.leaves])
    assert torch.equal(draws[:, :4].max(1).values, draws[:, 4])
    assert all(leaves[4].seed == leaves[int(draws[k, :4].argmax())].seed for k, leaves in enumerate(judge.leaves))


def test_a_warm_start_costs_its_draws_and_keeps_the_noise_given_as_number_zero() -> None:
    chain = one_step(cases=2)
    strong = 10 * torch.ones(2, D)
    found = optimise(chain, judge_of(chain, along), RenoConfig(iterations=3, warm_start=5), noise=strong)
    assert chain.budget.nfe == 2 * (5 + 3 + 2 * 2)
    assert torch.equal(found.first, along(strong, [0, 1]))
    assert torch.equal(found.rewards[0], found.first)


@pytest.mark.parametrize("shared", [True, False])
def test_the_many_step_sampler_runs_once_from_the_best_noise(shared: bool) -> None:
    chain = one_step(cases=2)
    longer = gaussian_chain(steps=5, width=D, cases=2, budget=chain.budget if shared else None)
    judge, last = judge_of(chain, along), judge_of(longer, along)
    found = optimise(chain, judge, RenoConfig(iterations=4), finish=last)
    assert longer.calls == [(i, 2) for i in range(5)]
    _, media = longer.generate(found.noise, [0, 1])
    assert found.final is not None
    assert torch.equal(found.final, along(media, [0, 1]))
    assert not torch.equal(found.final, found.best)
    assert [len(leaves) for leaves in judge.leaves] == [4, 4]
    assert [len(leaves) for leaves in last.leaves] == [1, 1]
    assert torch.equal(last.best[0][0].media, media[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("nfe", range(1, 24))
@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_the_budget_is_never_exceeded_and_spent_as_far_as_it_goes(nfe: int, optimizer: str) -> None:
    chain = one_step(cases=2, budget=nfe)
    found = optimise(chain, judge_of(chain, along), RenoConfig(iterations=6, optimizer=optimizer))
    affordable = min(6, 1 + (nfe - 1) // 3)
    looks = len(chain.calls) // (2 if optimizer == "lbfgs" else 1)
    assert looks == affordable == len(found.rewards)
    assert chain.budget.nfe == sum(n for _, n in chain.calls) + 2 * 2 * (affordable - 1)
    assert chain.budget.nfe <= 2 * nfe
    assert found.ended == (("iterations" if affordable == 6 else "budget"),) * 2


@pytest.mark.parametrize("nfe", range(6, 40))
def test_draws_iterations_and_the_finish_share_one_budget(nfe: int) -> None:
    chain = one_step(cases=2, budget=Limits(nfe=nfe, decodes=9, reward_calls=18))
    longer = gaussian_chain(steps=5, width=D, cases=2, budget=chain.budget)
    judge, last = judge_of(chain, along, rewards=2), judge_of(longer, along, rewards=3)
    found = optimise(chain, judge, RenoConfig(warm_start=3), finish=last)
    assert found.final is not None
    assert chain.budget.nfe <= 2 * nfe
    assert chain.budget.decodes <= 18
    assert chain.budget.reward_calls <= 36
    if nfe >= 11:
        assert len(found.rewards) >= 2  # some update is left
    if nfe >= 14:
        assert len(judge.leaves[0]) == 3 + len(found.rewards)


def test_a_case_that_stops_early_leaves_its_neighbours_runs_as_long_as_alone() -> None:
    def flat_for_the_first(media: Tensor, rows: Sequence[int]) -> Tensor:
        return torch.tensor([float(row != 0) for row in rows]) * along(media, rows)

    chain = one_step(cases=2, budget=20)
    found = optimise(chain, judge_of(chain, flat_for_the_first), RenoConfig(patience=1))
    alone = run(along, seed=1000, budget=20)
    assert same(found.rewards[:, 1], alone.rewards[:, 0])
    assert chain.budget.nfe < 2 * 20


def test_a_budget_below_one_image_fails_before_anything_is_spent() -> None:
    chain = ToyChain(lambda x, alpha, sigma: x, steps=4, width=D, budget=3)
    with pytest.raises(BudgetError, match="at least 4"):
        optimise(chain, judge_of(chain, along))
    short = one_step(budget=5)
    longer = gaussian_chain(steps=5, width=D, budget=short.budget)
    with pytest.raises(BudgetError, match="at least 6"):
        optimise(short, judge_of(short, along), finish=judge_of(longer, along))
    assert chain.budget.nfe == short.budget.nfe == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"learning_rate": 0.0},
        {"optimizer": "sdg"},
        {"momentum": 1.0},
        {"clip": -1.0},
        {"patience": -1},
    ],
)
def test_a_wrong_setting_is_quoted(wrong: dict[str, object]) -> None:
    (value,) = wrong.values()
    with pytest.raises(ConfigError, match=str(value)):
        RenoConfig(**wrong)  # type: ignore[arg-type]


def test_noise_of_another_shape_is_refused() -> None:
    chain = one_step(cases=2)
    with pytest.raises(ConfigError, match=r"\(3, 64\)"):
        optimise(chain, judge_of(chain, along), noise=torch.zeros(3, D))
