"""A reward that was trained here (`diffalign train` with objective: reward), by its folder or its name.

The score is the model's rating, less the mean over held-out pictures and over their deviation, so that rewards trained
apart add up. Parts: the rating itself, and where it was taught to tell doubts, their deviation in units of the score.

Where we differ: nothing published is rebuilt here; the losses are those of `diffalign.train.reward_models.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign import own_rewards, valued, weights
from diffalign.cases import Case
from diffalign.clip_tower import ClipTower, Dtype
from diffalign.errors import ConfigError, DiffalignError, ModelError
from diffalign.judges.asking import Question
from diffalign.judges.local import LocalJudge
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.vision import ROUNDED, Route


@register_reward("trained", differentiable=True)
class Trained:
    """`model` is the name of a reward you trained, or its folder; one of a vision language model has no gradient."""

    reads_prompt = True

    def __init__(
        self,
        model: str,
        base: str | None = None,  # of a vision language model: where the model it was made of is now
        dtype: Dtype = "float32",
        path: Route = "auto",
        batch: int = 16,  # pictures at once, for a vision language model
        checkpointing: bool = False,
    ) -> None:
        folder = own_rewards.folder_of(model)
        if folder is None:
            known = ", ".join(own_rewards.names()) or "none yet"
            raise ConfigError(
                f"there is no trained reward '{model}': no folder with a {own_rewards.CARD}, and no name (known: "
                f"{known}). Train one: diffalign train reward_shapes name={Path(model).name}"
            )
        if batch < 1:
            raise ConfigError(f"trained.batch is {batch}, but at least 1 picture is looked at.")
        self.folder, self.card = folder, own_rewards.read_card(folder)
        self.options = {"dtype": dtype, "path": path}  # a folder may move
        self.base, self.dtype, self.path, self.batch, self.checkpointing = base, dtype, path, batch, checkpointing
        clip = self.card.tower == "clip"
        self.differentiable = clip and path != "reference"
        self.no_gradient = ROUNDED if clip else "a vision language model reads whole pictures of 8 bits"

    @cached_property
    def version(self) -> str:
        """Our revision of the computation, and which weights it uses."""
        found = weights.digest_of_tensors(self.folder)
        if found != self.card.weights:
            raise ModelError(
                f"the weights in '{self.folder}' are not those of its card ({found}, not {self.card.weights}): they "
                "were exchanged or changed. Train it again, or restore them."
            )
        return f"1 {self.card.computation}"

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        _ = self.version
        prompts = [case.prompt for case in cases]
        found = self._by_clip(media, prompts) if self.card.tower == "clip" else self._by_vlm(media, prompts)
        rating, log_deviation = found.float().to(media.device).unbind(1)
        parts = {"rating": rating}
        if self.card.doubts:
            parts["doubt"] = log_deviation.exp() / self.card.deviation
        return Score((rating - self.card.mean) / self.card.deviation, parts)

    def _by_clip(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        head = self.head.to(media.device) if self.card.doubts else None
        seen, read = self.tower.images(media), self.tower.texts(prompts, media.device)
        return valued.rating_of_clip(seen, read, self.tower.scale, head)

    @torch.no_grad()
    def _by_vlm(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        head = self.head.to(media.device)
        sound = media.isfinite().flatten(1).all(1)
        asked = [
            Question(text=valued.asked(self.card.instruction, prompt), images=(image,))
            for image, prompt in zip(media.where(sound[:, None, None, None], 0.0), prompts, strict=True)
        ]
        parts = [asked[k : k + self.batch] for k in range(0, len(asked), self.batch)]
        found: Tensor = torch.cat([head(valued.last_states(self.reader, part).float()) for part in parts])
        return found.where(sound[:, None], torch.nan)

    @cached_property
    def tower(self) -> ClipTower:
        place = str(self.folder / "clip")
        return ClipTower(place, dtype=self.dtype, path=self.path, checkpointing=self.checkpointing)

    @cached_property
    def reader(self) -> LocalJudge:
        """The model it was made of, with what was learnt merged in."""
        base = self.base or self.card.base
        try:
            version = valued.reader(base, dtype=self.dtype).version
        except DiffalignError as e:
            raise ModelError(
                f"this reward was made of '{self.card.base}', which cannot be read: {e} Give the option base: "
                "where it is now."
            ) from e
        if version != self.card.base_version:
            raise ModelError(
                f"this reward was made of '{self.card.base}' as it was ({self.card.base_version}), and '{base}' is "
                f"another model ({version}). Give the option base: where the right one is."
            )
        adapter = str(self.folder / "adapter")
        return valued.reader(base, adapter=adapter, dtype=self.dtype, pixels=self.card.pixels)

    @cached_property
    def head(self) -> nn.Module:
        """What makes ratings of states, or doubts of embeddings."""
        state = weights.read(self.folder / valued.HEAD)
        made = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
        weights.fit(made, state, f"'{self.folder}'")
        return weights.frozen(made, torch.float32)
