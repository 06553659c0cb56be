"""NFT: denoise towards what is good and away from what is bad, by one model that stands for both.

Paper: "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025 (arXiv 2509.16117). A good image is
learnt by (1 - b) old + b model, a bad one by (1 + b) old - b model; with infinite data the model ends at the old one
plus 2 / b of the direction from it to the good.

Where we differ: noise levels are drawn for each prompt, stratified, and not in random order for each image; the sampler
is whatever the pipeline has. Models that predict noise go through the same clean latents; pure noise tells them
nothing and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.train.forward import ForwardProcess
from diffalign.train.renoised import FollowConfig, ForwardConfig, Seen, mean_error, scale_of


@dataclass(frozen=True, kw_only=True)
class NFTConfig(ForwardConfig):
    """How far the two models stand apart, and how the old one follows."""

    beta: float = 1.0  # how much of the model is in the good and the bad one; 0.1 is usual with several rewards
    adaptive: bool = True  # divide errors by their own size
    draws: int = 9  # noise levels of each image
    old: FollowConfig = field(default_factory=FollowConfig)  # the model that draws and that is compared with

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ConfigError(f"beta is {self.beta}, but it must be above 0. 1 and 0.1 are usual.")


def two_sided(
    positive: Tensor, negative: Tensor, clean: Tensor, share: Tensor, beta: float, *, adaptive: bool = True
) -> Tensor:
    """share P / b + (1 - share) N / b (B,), with P and N the errors of the good and the bad model's clean latents."""
    good, bad = mean_error(positive, clean), mean_error(negative, clean)
    if adaptive:
        good, bad = good / scale_of(positive, clean), bad / scale_of(negative, clean)
    return (share * good + (1 - share) * bad) / beta


class NFT(ForwardProcess):
    """A good and a bad model in one."""

    name: ClassVar[str] = "nft"
    settings: ClassVar[type[NFTConfig]] = NFTConfig
    OLD: ClassVar[tuple[str, ...]] = ("old",)
    SAMPLES: ClassVar[str] = "old"
    COMPARES: ClassVar[str] = "old"
    figures: ClassVar[tuple[str, ...]] = ("moved",)
    config: NFTConfig

    def loss(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        assert seen.old is not None
        beta, place = self.config.beta, seen.place
        clean = [
            seen.levels.denoised(place.noisy, seen.old + sign * beta * (seen.prediction - seen.old), place.i)
            for sign in (1, -1)
        ]
        share = seen.of(seen.micro.share).double()
        loss = two_sided(clean[0], clean[1], place.clean, share, beta, adaptive=self.config.adaptive)
        moved = mean_error(seen.prediction.detach(), seen.old)
        return (loss * seen.advantage_clip).float(), {"moved": moved}


OBJECTIVE = NFT
