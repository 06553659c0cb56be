"""What the verbs that run a model share: which model, where, on which prompts, judged by what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.cases import Case

LONGEST_PROMPT = 4000  # characters; text encoders here read 12 to 512 tokens
Split = Literal["heldout", "hard", "train"]


@dataclass(frozen=True, kw_only=True)
class ModelVerb(Verb):
    """A verb that runs a pipeline."""

    model: Annotated[str, Opt("Embedded model, folder, or hub id.", flag="-m")] = "shapes-sd3"
    device: Annotated[str, Opt("cpu, cuda, cuda:1, mps; auto takes the fastest here.")] = "auto"
    dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"], Opt("auto: float32 on CPU, else bfloat16.")] = (
        "auto"
    )
    attention: Annotated[
        str | None, Opt("Attention backend: native, xformers, flash, sage ...; checked to take effect.")
    ] = None
    lora: Annotated[str | None, Opt("What a training saved, or a LoRA: folder, .safetensors file, hub id.")] = None
    call: dict[str, Any] = field(default_factory=dict)  # arguments of the pipeline's call, over the model's card

    @property
    def embedded(self) -> bool:
        """Whether the model ships with diffalign, so that the verifier can read its pictures."""
        from diffalign import zoo

        return self.model in zoo.names()

    def pipeline_call(self) -> dict[str, Any]:
        """The arguments every call of this model gets: its card's, then ours."""
        from diffalign import zoo

        known = dict(zoo.card(self.model)["call"]) if self.embedded else {}
        return known | self.call

    def place(self) -> tuple[str, str]:
        """Device and dtype by name."""
        import torch

        fastest = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = fastest if self.device == "auto" else self.device
        if device == "cuda" and "LOCAL_RANK" in os.environ:  # each process of a launcher has a device of its own
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        return device, ("float32" if device == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype

    def pipeline(self) -> Any:
        """The stock pipeline, loaded, moved, and with the asked attention."""
        import torch

        quiet_libraries()
        from diffalign.shell import load_pipeline

        device, dtype = self.place()
        pipe = load_pipeline(self.model, torch_dtype=getattr(torch, dtype))
        if self.lora:
            _load_lora(pipe, self.lora)
        try:
            pipe.to(device)
        except (RuntimeError, AssertionError) as e:
            raise ConfigError(f"device is '{device}', which does not work here: {str(e).splitlines()[0]}") from e
        if self.attention:
            from diffalign.attention import use_attention

            use_attention(pipe, self.attention)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def rows_per_image(self, call: Mapping[str, Any]) -> int:
        """Estimated NFE of one image: steps, twice with guidance."""
        steps = int(call.get("num_inference_steps", 50))
        guided = float(call.get("guidance_scale", 5.0)) > 1
        return steps * (2 if guided else 1)


@dataclass(frozen=True, kw_only=True)
class PromptVerb(ModelVerb):
    """A verb that runs a pipeline on prompts."""

    prompt: Annotated[tuple[str, ...], Opt("A prompt; repeat it for more.", flag="-p")] = ()
    prompts: Annotated[str | None, Opt("File of prompts: .txt, .jsonl, .csv, parquet, or a benchmark's own.")] = None
    prompts_format: Annotated[str | None, Opt("Its format, where name and content mislead: plain, geneval ...")] = None
    split: Annotated[Split | None, Opt("Prompt set of the shapes world.")] = None
    limit: Annotated[int | None, Opt("Use only the first so many prompts.")] = None
    image_seed: Annotated[int | None, Opt("The image's own seed, as a gallery names it; with one --prompt.")] = None

    def cases(self) -> list[Case]:
        """What is asked, each case with its seed."""
        from diffalign.cases import Case
        from diffalign.data.prompt_sets import read_prompts

        sources = [bool(self.prompt), self.prompts is not None, self.split is not None]
        if sum(sources) != 1:
            raise ConfigError("say what to draw with one of --prompt, --prompts FILE or --split.")
        if self.prompts is not None:
            cases = read_prompts(self.prompts, self.prompts_format, seed=self.seed)
        elif self.split is not None:
            from diffalign import world

            cases = self.spaced(world.prompts(self.split))
        else:
            cases = self.spaced([Case(prompt=prompt) for prompt in self.prompt])
        if self.image_seed is not None:
            if len(self.prompt) != 1:
                raise ConfigError("image_seed is one image's own seed. Give exactly one --prompt with it.")
            cases = [cases[0].with_seed(self.image_seed)]
        cases = cases[: self.limit]
        require_prompts(cases)
        return cases

    def spaced(self, cases: list[Case]) -> list[Case]:
        from diffalign.cases import derived_seed

        return [case.with_seed(derived_seed(self.seed, "prompt", i)) for i, case in enumerate(cases)]


def _load_lora(pipe: Any, place: str) -> None:
    from pathlib import Path

    from diffalign.train import adapter_files

    file = Path(place)
    if (file / adapter_files.NOTE).is_file():  # a training's, which says how to load it
        return adapter_files.load(pipe, file)
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigError(f"{type(pipe).__name__} takes no LoRA. Leave --lora out, or fine-tune another model.")
    where: dict[str, Any] = {"weight_name": file.name} if file.is_file() else {}
    try:
        pipe.load_lora_weights(str(file.parent) if file.is_file() else place, use_safetensors=True, **where)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise ConfigError(f"cannot load the LoRA '{place}': {' '.join(str(e).split())[:300]}") from e


def require_prompts(cases: list[Case]) -> None:
    """Refuse prompts that no model can follow."""
    if not cases:
        raise ConfigError("there is no prompt left to draw. Raise --limit, or give another prompt set.")
    for number, case in enumerate(cases, 1):
        if not case.prompt.strip():
            raise ConfigError(f"prompt {number} is empty. Write what the image should show.")
        if len(case.prompt) > LONGEST_PROMPT:
            raise ConfigError(
                f"prompt {number} has {len(case.prompt):,} characters (it starts '{case.prompt[:40]}'), and text "
                f"encoders cut it off unseen. Shorten it to at most {LONGEST_PROMPT:,}; most models read far less."
            )


def quiet_libraries() -> None:
    """Keep loading bars and notices of the libraries out of our output."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        with contextlib.suppress(AttributeError):
            logging.disable_progress_bar()
