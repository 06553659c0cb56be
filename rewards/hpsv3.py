"""HPSv3: how much people like a picture for its prompt, rated by a vision language model that also tells its doubt.

Yuhang Ma et al.: "HPSv3: Towards Wide-Spectrum Human Preference Score", 2025 (arXiv 2508.03789). Qwen2-VL reads the
picture, a rating instruction with the prompt, and one special token; a small head turns the hidden state of that token
into mu, which is the reward, and log sigma: a rating is held to be normal with this mean and deviation.

Where we differ:
- `instruction` is our own unless you give the published one, which the published weights were trained with.
- What follows the special token in the published chat is left out: a causal model cannot look ahead.
- Marks of the tokenizer inside a prompt, such as <|Reward|> or <|im_end|>, are read as plain text.
- Where a gradient is asked for, pictures are resized as tensors (bicubic with antialias; the published code is bilinear
  there) and not rounded to 8 bits; `path` fixes one way. Any number of them goes at once, not one.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffalign.cases import Case
from diffalign.errors import ConfigError, ModelError
from diffalign.qwen_tower import BASE, QwenTower
from diffalign.registry import register_reward
from diffalign.scoring import Score
from diffalign.vision import ROUNDED, Route

HUB, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
PIXELS = 256 * 28 * 28  # 256 tokens of the language model
WIDEST = 200  # the longer side over the shorter; Qwen2-VL takes no picture beyond
HOLE = "{text_prompt}"
INSTRUCTION = (
    f"Rate from 0 to 10 how good this generated image looks and how well it shows its prompt.\nPrompt: {HOLE}\n"
)
# The line that leads to the special token is that of github.com/MizzenAI/HPSv3 (MIT), dataset/data_collator_qwen.py.
QUESTION, REWARD = "\nPlease provide the overall ratings of this image: ", "<|Reward|>"
SYSTEM = "system\nYou are a helpful assistant."  # what Qwen2-VL's chat starts with when nobody says otherwise


@register_reward("hpsv3", differentiable=True)
class HPSv3:
    """Parts: mu, which is the reward, and sigma; `model` is a hub id, a checkpoint, or a folder with one or its shards.

    `instruction` is a text with {text_prompt} in it, a file of such a text, or the published data_collator_qwen.py.
    """

    reads_prompt = True

    def __init__(
        self,
        model: str = HUB,
        base: str = BASE,  # whose settings and tokenizer to use: a hub id or a folder
        revision: str | None = None,  # of the model
        instruction: str | None = None,
        pixels: int = PIXELS,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        path: Route = "auto",
        micro_batch: int = 8,  # pictures at once
        checkpointing: bool = False,  # less memory where a gradient is asked for, at a second pass
    ) -> None:
        if micro_batch < 1 or pixels < 1:
            raise ConfigError(f"hpsv3.micro_batch is {micro_batch} and pixels {pixels}; both are at least 1.")
        self.options = {"model": model, "base": base, "revision": revision, "instruction": instruction} | {
            "pixels": pixels,
            "dtype": dtype,
            "path": path,
        }
        self.wording, self.micro_batch = instruction, micro_batch
        self.differentiable, self.no_gradient = path != "reference", ROUNDED
        self.tower = QwenTower(
            model,
            FILE,
            base,
            revision=revision,
            pixels=pixels,
            dtype=getattr(torch, dtype),
            path=path,
            checkpointing=checkpointing,
        )

    @cached_property  # of what is loaded: a file that changes later does not change it
    def version(self) -> str:
        asked = hashlib.sha256(self.instruction.encode()).hexdigest()[:16]
        return f"1 {asked} {self.tower.version}"

    @cached_property
    def instruction(self) -> str:
        if self.wording is None:
            warnings.warn(
                "hpsv3 asks in our own words, and the published weights were trained with other ones, so its scores "
                "are not the published ones. Give `instruction` the path of the published data_collator_qwen.py.",
                stacklevel=3,
            )
        return instruction_of(INSTRUCTION if self.wording is None else self.wording)

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Score:
        sound = media.isfinite().flatten(1).all(1)  # (B,)
        if max(media.shape[-2:]) > WIDEST * min(media.shape[-2:]):
            return Score(torch.full((len(media),), torch.nan, device=media.device))
        pixels = media.where(sound[:, None, None, None], 0.0)
        before, after = self.chat([case.prompt for case in cases])
        slices = [slice(k, k + self.micro_batch) for k in range(0, len(cases), self.micro_batch)]
        found = torch.cat([self.tower(pixels[rows], before, after[rows]) for rows in slices])  # (B, 2)
        mu, log_sigma = found.where(sound[:, None], torch.nan).unbind(1)
        return Score(mu, {"mu": mu, "sigma": log_sigma.exp()})

    def chat(self, prompts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Ids before a picture, and for each prompt those after it; text between two marks is encoded by itself."""
        start, end, opening, closing, reward = self._marks
        system, line, user = self._ids([SYSTEM, "\n", "user\n"])
        asked = self._ids([self.instruction.replace(HOLE, prompt) + QUESTION for prompt in prompts])
        before = [start, *system, end, *line, start, *user, opening]
        return before, [[closing, *ids, reward] for ids in asked]

    @cached_property
    def _marks(self) -> list[int]:
        """The special token comes after all others, unless the tokenizer has it."""
        known = self.tower.tokenizer.get_vocab()
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        if missing := [name for name in names if name not in known]:
            raise ConfigError(f"the tokenizer of '{self.tower.base}' has no {missing[0]}. Use `base`: {BASE}.")
        found = [*(known[name] for name in names), known.get(REWARD, max(known.values()) + 1)]
        rows = self.tower.rater.model.language_model.embed_tokens.num_embeddings
        if max(found) >= rows:
            raise ModelError(
                f"'{self.tower.model}' has {rows} tokens, none of which is {REWARD} ({found[-1]}), where it reads the "
                "rating. These are not the weights of HPSv3, or `base` is another model."
            )
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        whole = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate is no text
        found = self.tower.tokenizer(whole, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        return ids


def instruction_of(wording: str) -> str:
    """A wording as it is, or that of a file; of Python source it is the constant INSTRUCTION, read and not run."""
    text = wording
    if HOLE not in wording:
        file = Path(wording).expanduser()
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"hpsv3.instruction is '{wording[:60]}', which has no {HOLE} where the prompt goes, and is no file "
                f"we can read ({type(e).__name__}). Write the text with {HOLE} in it, or the path of a file."
            ) from e
        text = _constant(text, "INSTRUCTION") if file.suffix == ".py" else text
    if HOLE not in text:
        raise ConfigError(f"the instruction in '{wording[:60]}' has no {HOLE} where the prompt goes.")
    return text


def _constant(source: str, name: str) -> str:
    try:
        for line in ast.parse(source).body:
            if isinstance(line, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in line.targets):
                return str(ast.literal_eval(line.value))
    except (SyntaxError, ValueError):
        pass
    return ""
