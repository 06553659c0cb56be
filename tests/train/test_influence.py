from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError
from diffalign.train import influence

N = 6


def drawn(seed: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, 4, size, size, generator=generator)
    return noise, torch.randn(N, 12, generator=generator), torch.randn(N, generator=generator)


def test_noise_is_averaged_over_blocks_of_8() -> None:
    noise, _, _ = drawn(0)
    found = influence.projected(noise).reshape(N, 4, 2, 2)
    torch.testing.assert_close(found[2, 1, 0, 1], noise[2, 1, :8, 8:].mean())
    assert influence.projected(noise[..., :3, :3]).shape == (N, 4)
    assert influence.projected(torch.randn(2, 4, 5, 16, 16)).shape == (2, 4 * 5 * 4)
    with pytest.raises(ConfigError, match="no height and width"):
        influence.projected(torch.randn(2, 64, 16))


@given(st.integers(0, 1000))
def test_the_kernel_is_symmetric_and_positive_semidefinite(seed: int) -> None:
    noise, features, _ = drawn(seed)
    K = influence.kernel(noise, features)
    torch.testing.assert_close(K, K.T)
    assert bool((K.diagonal() >= 0).all())
    assert float(torch.linalg.eigvalsh(K.double()).min()) >= -1e-4 * float(K.trace())


@given(st.integers(0, 1000))
def test_what_an_image_does_for_itself_is_never_negative(seed: int) -> None:
    noise, features, _ = drawn(seed)
    K = influence.kernel(noise, features)
    for j in range(N):
        alone = torch.zeros(N)
        alone[j] = 0.7
        assert float(influence.thr(K, alone)[j]) >= 0


def test_influence_counts_good_images_of_the_own_group_and_takes_the_images_sign() -> None:
    K = torch.arange(16.0).reshape(4, 4)
    A, gid = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([0, 0, 1, 1])
    assert influence.thr(K, A).tolist() == [8.0, -(1 + 9.0), 2 + 10.0, 0]
    assert influence.thr(K, A, gid).tolist() == [0, -1, 10, 0]


def test_without_strength_and_threshold_advantages_are_unchanged() -> None:
    noise, features, A = drawn(3)
    size = influence.thr(influence.kernel(noise, features), A)
    assert torch.equal(influence.reweighted(A, size), A)


def test_strength_moves_advantages_by_the_sign_of_their_influence() -> None:
    A, size = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, -0.5, 0.01])
    assert influence.reweighted(A, size, p=0.1, tau=0.1).tolist() == pytest.approx([1.1, -1.8, 0])


def test_shares_of_steps_sum_to_1_and_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    size = torch.tensor([[1.0, -1.0, 0.0], [3.0, 1.0, 0.0]])
    assert influence.step_influence(size).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    influence.plot(size, tmp_path / "influence.png")
    assert (tmp_path / "influence.png").read_bytes()[:4] == b"\x89PNG"
    influence.plot(torch.zeros(2, 3), tmp_path / "none.png")
