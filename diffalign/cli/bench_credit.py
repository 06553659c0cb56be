"""`diffalign bench credit`: ways to credit steps, measured without a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from diffalign.cli.model import ModelVerb, Split
from diffalign.cli.verb import Opt

if TYPE_CHECKING:
    from diffalign.bench.credit import CreditBench

DENSE: dict[str, Any] = {"advantage": {"step_norm": "group_step"}}
METHODS: dict[str, dict[str, Any]] = {
    "flow_grpo": {},
    "dense": {"objective": "dense_grpo", **DENSE},
    "dense_shuffled": {"of": "dense", "control": "shuffled"},
}


@dataclass(frozen=True, kw_only=True)
class Credit(ModelVerb):
    """Which part of the reward is a step's own? Ways to credit steps at a frozen policy, on the same walks.

    The noise of single steps is drawn again and completed, which tells the true advantage of every step, how well each
    method's credit ranks with it, and at which steps the reward's variance arises. The gradient of every method is
    taken on the same walks: its signal over its noise, for what it costs. Run the same command again to go on after a
    stop.

    Writes OUT/rows.jsonl (a line per part), table.md, plot.png, settings.json, gradients/ and with --influence
    influence.png: which steps carry influence on the images that did well.

    \b
    diffalign bench credit --config credit_shapes
    diffalign bench credit --config credit_shapes --parts 4 --influence
    diffalign bench credit --config credit_shapes oracle.redraws=0 --groups 8 --out out/snr
    """

    NAME: ClassVar[str] = "credit"
    out: Annotated[str | None, Opt("Folder for rows, table and plot.")] = "out/bench_credit"
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("What is credited.", flag="-r")] = ("shapes_soft",)
    split: Annotated[Split | None, Opt("Prompt set of the shapes world.")] = None
    prompts: Annotated[str | None, Opt("Or a file of prompts.")] = None
    parts: Annotated[int, Opt("Training steps to compare on, each with prompts of its own.")] = 8
    reference: Annotated[int, Opt("Further ones with the plain gradient only, to measure biases against.")] = 8
    groups: Annotated[int, Opt("Prompts of a part.")] = 4
    group_size: Annotated[int, Opt("Images of a prompt.")] = 8
    influence: Annotated[bool, Opt("Also draw which steps carry influence (THR).")] = False
    micro_batch: int = 32
    precision: Literal["no", "bf16", "fp16"] = "no"
    sampling: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=lambda: {"rank": 4})
    oracle: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: METHODS)

    OWN: ClassVar[tuple[str, ...]] = (
        "reward", "prompts", "parts", "reference", "groups", "group_size", "influence", "micro_batch", "precision",
        "sampling", "noise", "adapter", "oracle", "methods",
    )  # fmt: skip

    def bench(self) -> CreditBench:
        from diffalign import config
        from diffalign.bench.credit import CreditBench

        split = "train" if self.split is None and self.prompts is None else self.split
        return config.build(CreditBench, {name: getattr(self, name) for name in self.OWN} | {"split": split})

    def cost(self) -> dict[str, Any]:
        """Estimates of the walks and redraws, without what methods spend on credit and gradients."""
        from diffalign import config
        from diffalign.train.schedules import NoiseConfig, noise_levels

        told = self.bench()
        steps = int({**self.pipeline_call(), **told.sampling}.get("num_inference_steps", 50))
        each = self.rows_per_image({**self.pipeline_call(), **told.sampling}) // steps
        levels = noise_levels(0, steps, config.build(NoiseConfig, told.noise, where="noise"))
        noisy = [i for i, level in enumerate(levels) if level > 0]
        ends = {i: told.oracle.redraws * (1 if i == noisy[-1] else told.oracle.completions) for i in noisy}
        images = told.parts * told.images
        return {
            "parts": told.parts + told.reference,
            "nfe_of_walks": (told.parts + told.reference) * told.images * steps * each,
            "nfe_of_redraws": images * sum((steps - i - 1) * count for i, count in ends.items()) * each,
            "images_of_redraws": images * sum(ends.values()),
        }

    def run(self) -> dict[str, Any]:
        from diffalign import atomic
        from diffalign.bench import credit, credit_report
        from diffalign.cli.truth import progress
        from diffalign.train import influence

        told, folder = self.bench(), atomic.require_folder(self.out or "out/bench_credit")
        with progress(told.parts + told.reference, "parts") as advance:
            found = credit.run(
                self.pipeline(), told, model=self.model, call=self.pipeline_call(), seed=self.seed, folder=folder,
                origin={"lora": self.lora, "dtype": self.place()[1]}, advance=advance,
            )  # fmt: skip
        figures = credit_report.summary(found, told.methods, told.groups, seed=self.seed)
        text = credit_report.table(figures)
        atomic.write_text(folder / "table.md", text)
        title = f"{self.model}, {figures['walks']} walks of {told.parts * told.groups} prompts"
        credit_report.draw(figures, folder / "plot.png", title=title)
        if told.influence:
            rows = [row["thr"] for row in found.rows if "thr" in row]
            influence.plot(credit.tensor(rows).flatten(0, 1), folder / "influence.png")
        print(text, end="")
        print(f"rows, table and plot are in {folder}")
        plain: dict[str, Any] = atomic.finite(figures)
        return plain
