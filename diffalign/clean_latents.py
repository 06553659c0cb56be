"""Pictures as the clean latents of a pipeline's loop, with a gradient to the pixels.

The pipeline's own autoencoder encodes; how its raw latents are scaled, shifted and packed for the loop is read off
the pipeline's decoding, backwards, so that no family's constants and no packing is spelled out here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.drive import Driver
from diffalign.errors import ModelError
from diffalign.restore import frozen

DIGITS = 32  # latents are numbered in this base: its digits survive bfloat16


class Encoder:
    """The way from pixels to the latents that a pipeline's loop ends with."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.who = pipe, type(pipe).__name__
        self._read: dict[tuple[int, int], Arrangement] = {}  # of the latest size

    def latents(self, media: Tensor, driver: Driver) -> Tensor:
        """Media (B, 3, H, W) in [0, 1] -> latents (B, ...) float32 of the loop of `driver`, which draws that size."""
        size = (int(media.shape[-2]), int(media.shape[-1]))
        if size not in self._read:
            with torch.inference_mode(False), torch.no_grad():
                self._read = {size: self._tried(driver, media[:1].detach())}
        found = self._read[size]
        return found.loop_latents(self._encode(media, found.raw_shape))

    @functools.cached_property
    def name(self) -> str:
        """The component that encodes pictures and decodes latents."""
        for name, module in self.pipe.components.items():
            if isinstance(module, torch.nn.Module) and hasattr(module, "encode") and hasattr(module, "decode"):
                return str(name)
        raise ModelError(f"{self.who} has no autoencoder that encodes, so pictures cannot be turned into its latents.")

    @functools.cached_property
    def _coder(self) -> Any:
        """The autoencoder; one that overflows in half precision as a copy in float32."""
        coder = getattr(self.pipe, self.name)
        overflows = coder.dtype == torch.float16 and getattr(coder.config, "force_upcast", False)
        return copy.deepcopy(coder).float() if overflows else coder

    def _encode(self, media: Tensor, raw_shape: Sequence[int]) -> Tensor:
        """Raw latents (B, ...) float32: the mode where the autoencoder gives a distribution."""
        coder = self._coder
        pixels = (media * 2 - 1).to(next(coder.parameters()))
        if len(raw_shape) == 4:  # a video autoencoder takes a picture as one frame
            pixels = pixels[:, :, None]
        with frozen([coder]), still([coder]), torch.set_grad_enabled(media.requires_grad and torch.is_grad_enabled()):
            found = coder.encode(pixels)
        spread = getattr(found, "latent_dist", None)
        raw: Tensor = spread.mode() if spread else found.latents if hasattr(found, "latents") else found.latent
        return raw.float()

    def _tried(self, driver: Driver, media: Tensor) -> Arrangement:
        """The arrangement, tried on one picture (1, 3, H, W): what is encoded must reach the decoder again."""
        found = Arrangement.read(driver, self.name)
        raw = self._encode(media, found.raw_shape)
        if raw.shape[1:] != found.raw_shape:
            height, width = media.shape[-2:]
            raise ModelError(
                f"{self.who} decodes latents of the shape {tuple(found.raw_shape)}, but {height} x {width} pixels are "
                f"encoded as {tuple(raw.shape[1:])}. Give a height and width in `call` that the model can draw."
            )
        back = _handed(driver, self.name, found.loop_latents(raw))
        if not torch.allclose(back, raw.to(back), rtol=2e-2, atol=2e-2 * float(raw.abs().mean())):
            raise _no_way_back(self.who)
        return found


@dataclass(frozen=True)
class Arrangement:
    """How the latents of a pipeline's loop are made of its autoencoder's raw ones: scaled, shifted, rearranged."""

    shape: torch.Size  # of the loop's latents for one picture
    raw_shape: torch.Size
    order: Tensor  # (N,) which raw number each latent is made of
    scale: Tensor  # (N,) raw = scale * latent + shift
    shift: Tensor

    def loop_latents(self, raw: Tensor) -> Tensor:
        """(B, *raw_shape) -> (B, *shape)"""
        flat = (raw.flatten(1) - self.shift) / self.scale
        return flat[:, self.order].view(len(raw), *self.shape)

    @classmethod
    def read(cls, driver: Driver, coder: str) -> Arrangement:
        """Read from what the pipeline hands its autoencoder for zeros, ones, and the digits of each latent's number."""
        like, who = driver.start().float(), type(driver.pipe).__name__
        shift = _handed(driver, coder, torch.zeros_like(like))
        scale = (_handed(driver, coder, torch.ones_like(like)) - shift).flatten()
        numbers = torch.arange(like.numel(), device=like.device).view(like.shape)
        raw_shape, shift = shift.shape[1:], shift.flatten()
        place, unit = torch.zeros(shift.numel(), dtype=torch.long, device=like.device), 1
        while unit < like.numel():
            seen = _handed(driver, coder, (numbers // unit % DIGITS).to(like)).flatten()
            place = place + ((seen - shift) / scale).nan_to_num(-1).round().long() * unit
            unit *= DIGITS
        if not torch.equal(place.sort().values, numbers.flatten()):
            raise _no_way_back(who)
        return cls(like.shape[1:], raw_shape, place.argsort(), scale, shift)


class _Handed(BaseException):
    """Raised in place of a decoding, with what would have been decoded."""


def _handed(driver: Driver, coder: str, x: Tensor) -> Tensor:
    """The raw latents (1, ...) that the pipeline hands its autoencoder for latents x of its loop, float32."""
    module = getattr(driver.pipe, coder)

    def caught(*args: Any, **kwargs: Any) -> None:
        raise _Handed(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    own = vars(module).get("decode")
    vars(module)["decode"] = caught
    try:
        driver.decode(x.to(driver.start()))
    except _Handed as handed:
        found: Tensor = handed.args[0]
        return found.detach().float()
    finally:
        del vars(module)["decode"]
        if own is not None:
            vars(module)["decode"] = own
    raise ModelError(f"{type(driver.pipe).__name__} does not decode with its {coder}.")


def _no_way_back(who: str) -> ModelError:
    return ModelError(
        f"latents that {who} is given do not come back from it: its decoding does more than scale, shift and arrange "
        "them. Its pictures cannot be turned into latents here, so it cannot judge any; use another model."
    )


@contextmanager
def still(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Run a block without dropout: both branches must see the same model."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
