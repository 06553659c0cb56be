"""A text-to-image model's own opinion of finished pictures: unguided predictions of their noised latents.

A picture becomes the clean latent of the pipeline's loop; the seam predicts it at the true index of the pipeline's own
schedule, for its prompt or another, with guidance switched off. Nothing here names a model family.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import vision, weights
from diffalign.arguments import parameters
from diffalign.budget import Budget
from diffalign.cases import Case
from diffalign.clean_latents import Encoder, still
from diffalign.drive import Driver
from diffalign.errors import DiffalignError, ModelError
from diffalign.noise import Levels
from diffalign.probes import Denoise
from diffalign.restore import frozen
from diffalign.shell import load_pipeline, locate
from diffalign.zoo import shelf

Size = tuple[int, int]  # height, width
GUIDANCE = ("guidance_scale", "true_cfg_scale", "pag_scale")  # arguments by which pipelines amplify a prompt
OFF = (1.0, 0.0)  # what switches them off: 1 where the prompt's own prediction is scaled, 0 where something is added
SIDES = ("height", "width")


class LatentModel:
    """A pipeline turned on finished pictures: their clean latents, and unguided predictions for any prompt.

    `call` holds arguments of the pipeline's call; with a height and width, pictures are resized to them.
    """

    def __init__(self, pipe: Any, call: dict[str, Any] | None = None) -> None:
        self.pipe, self.call, self.who = pipe, dict(call or {}), type(pipe).__name__
        self.budget = Budget()  # model rows and backward passes so far
        self._encoder = Encoder(pipe)
        self._scouts: dict[Size, Driver] = {}  # of the latest size
        self._drivers: dict[tuple[Size, tuple[str, ...]], Driver] = {}  # of the latest prompts
        self._told = False

    def forget(self) -> None:
        """Drop remembered prompt embeddings: whoever trains the pipeline changes them."""
        self._drivers.clear()

    def move(self, device: torch.device) -> None:
        """Take the pipeline to another device; what was learnt on the old one is learnt again."""
        if self.pipe.device != device:
            self.pipe.to(device)
            self._encoder, self._scouts, self._drivers = Encoder(self.pipe), {}, {}

    def fitted(self, media: Tensor) -> Tensor:
        """Media (B, 3, H, W) float32 at the size that `call` asks for, or at their own."""
        height, width = (int(self.call.get(name) or own) for name, own in zip(SIDES, media.shape[-2:], strict=True))
        return vision.resize(media.float(), (height, width))

    def levels(self, size: Size) -> Levels:
        """The pipeline's own schedule for pictures of that size."""
        return self._scout(size).levels

    def clean(self, media: Tensor) -> Tensor:
        """The latents (B, ...) that the pipeline's loop ends with when it makes `media` (B, 3, H, W), float32."""
        return self._encoder.latents(media, self._scout((int(media.shape[-2]), int(media.shape[-1]))))

    def denoiser(self, prompts: Iterable[str], size: Size) -> Denoise:
        """Unguided predictions for rows that ask for any of `prompts`; the gradient goes to latents, not to weights."""
        unique = tuple(dict.fromkeys(prompts))
        driver, like = self._driver(unique, size), self._scout(size).start()
        place = {prompt: row for row, prompt in enumerate(unique)}

        def denoise(x: Tensor, i: int, asked: Sequence[str]) -> Tensor:
            graded = x.requires_grad and torch.is_grad_enabled()
            with frozen(driver.modules.values()), still(driver.modules.values()):
                return driver.select([place[prompt] for prompt in asked]).predict(x.to(like), i, grad=graded)

        return denoise

    def _driver(self, prompts: tuple[str, ...], size: Size) -> Driver:
        if (size, prompts) not in self._drivers:
            scout = self._scout(size)
            call = {k: v for k, v in scout.call.items() if k != "prompt"}
            made = self._made(list(prompts), call)
            made.learn_from(scout)
            self._drivers = {(size, prompts): made}
        return self._drivers[size, prompts]

    def _scout(self, size: Size) -> Driver:
        """The driver of one empty prompt, with guidance off, from which the others learn."""
        if size not in self._scouts:
            with torch.inference_mode(False), torch.no_grad():  # what is learnt here serves gradients later
                self._scouts = {size: self._unguided(size)}
                self._tell_distilled(self._scouts[size])
        return self._scouts[size]

    def _unguided(self, size: Size) -> Driver:
        known = parameters(self.pipe)
        if "prompt" not in known:
            raise ModelError(f"{self.who} takes no prompt, so it has no opinion of one. Use a text-to-image pipeline.")
        own = {"use_resolution_binning": False, **dict(zip(SIDES, size, strict=True))}
        call = {name: value for name, value in own.items() if name in known} | self.call
        free = [name for name in GUIDANCE if name in known and name not in call and known[name].default is not None]
        for off in OFF:
            driver = self._made([""], call | dict.fromkeys(free, off))
            rows = _most_rows(driver)
            if rows == 1:
                return driver
        raise ModelError(
            f"{self.who} runs {rows} rows for one picture, also with {', '.join(free) or 'its arguments'} at 1 and at "
            "0, so the prediction of one prompt alone is out of reach. Switch its guidance off in `call`."
        )

    def _tell_distilled(self, scout: Driver) -> None:
        """Warn once where guidance is an input of the model: no setting of it is the unguided model."""
        asked = [] if self._told else [name for name in GUIDANCE if name in scout.call]
        self._told = True
        x, middle = scout.start(), scout.length // 2
        for name in asked:
            other = self._made([""], {k: v for k, v in scout.call.items() if k != "prompt"} | {name: 4.0})
            if _most_rows(other) == 1 and not torch.equal(scout.predict(x, middle), other.predict(x, middle)):
                warnings.warn(
                    f"{self.who} reads {name} inside its model: guidance is distilled into the weights, and unguided "
                    f"predictions are not available. These are at {name}={scout.call[name]:g}; they can rank pictures, "
                    "but their ratio is no likelihood.",
                    stacklevel=2,
                )

    def _made(self, prompts: Sequence[str], call: dict[str, Any]) -> Driver:
        return Driver(self.pipe, [Case(prompt=prompt) for prompt in prompts], budget=self.budget, **call)


@functools.lru_cache(maxsize=2)
def load_model(name: str, revision: str | None, dtype: torch.dtype, version: str | None = None) -> Any:
    """A frozen pipeline from an embedded name, a folder or a hub id; two rewards of one `version` share it."""
    commit = revision if Path(locate(name)).is_dir() else version or revision  # exactly what the version names
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        pipe = load_pipeline(name, torch_dtype=dtype, **({"revision": commit} if commit else {}))
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipe


def card_call(name: str) -> dict[str, Any]:
    """The arguments that an embedded model's card asks for, but for its guidance."""
    known = shelf.card(name)["call"] if name in shelf.names() else {}
    return {argument: value for argument, value in known.items() if argument not in GUIDANCE}


def version_of(name: str, revision: str | None) -> str | None:
    """What tells the weights from others: the hash of a folder, the commit of a hub id; None where it is not known."""
    place = locate(name)
    if Path(place).is_dir():
        return weights.digest(Path(place))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place, "model_index.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _most_rows(driver: Driver) -> int:
    """The most rows that one picture costs at a level, told by a run whose model calls are all blank."""
    try:
        return max(driver.costs)
    except DiffalignError:
        raise
    except Exception as e:
        raise ModelError(
            f"{type(driver.pipe).__name__} does not run on a prompt and a size alone: {type(e).__name__}: {e}. "
            "What else it needs goes into `call`."
        ) from e
