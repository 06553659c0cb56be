"""`diffalign check`: what the seam can do with a pipeline, and how exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.cli.model import ModelVerb
from diffalign.cli.verb import Opt


@dataclass(frozen=True, kw_only=True)
class Check(ModelVerb):
    """Check a pipeline before trusting a method with it.

    Runs the pipeline a few times and reports each capability (schedule, predict, guidance, gradient, rollout, decode,
    replay, restore ...) as pass or fail with the largest error and the reason. Nothing is written.

    \b
    diffalign check
    diffalign check ./my-finetune call.num_inference_steps=8
    diffalign check ./my-editor --image photo.png --strict
    diffalign check stabilityai/stable-diffusion-3-medium-diffusers --device cuda --json check.json
    """

    NAME: ClassVar[str] = "check"
    model: Annotated[str, Opt("Embedded model, folder, or hub id.", positional=True)] = "shapes-sd3"
    prompt: Annotated[str, Opt("What to draw while checking.", flag="-p")] = "two red circles"
    image: Annotated[str | None, Opt("Picture to edit, for pipelines that take one.")] = None
    control: Annotated[str | None, Opt("Control picture, for ControlNet pipelines.")] = None
    strict: Annotated[bool, Opt("Exit with 1 if any capability fails.")] = False

    def checked_call(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "num_inference_steps": 4} | self.pipeline_call()

    def pictured_call(self, pipe: Any) -> dict[str, Any]:
        """The checked call with the pictures read, under the names this pipeline has for them."""
        from diffalign import arguments, vision

        known, call = arguments.parameters(pipe), self.checked_call()
        names = {"image": self.image, "control_image" if "control_image" in known else "image": self.control}
        call |= {name: vision.read_image(path) for name, path in names.items() if path is not None}
        if "prompt" not in known:
            call.pop("prompt")
        return call

    def cost(self) -> dict[str, Any]:
        return {"nfe_of_one_image": self.rows_per_image(self.checked_call()), "images": "about 20"}

    def run(self) -> dict[str, Any]:
        import diffalign

        pipe = self.pipeline()
        found = diffalign.check(pipe, **self.pictured_call(pipe))
        from rich.console import Console

        Console().print(found.table())
        result: dict[str, Any] = found.json()
        return result

    def status(self, result: dict[str, Any]) -> int:
        return int(self.strict and not all(row["ok"] for row in result["capabilities"].values()))
