"""Does step credit help? Methods on the same walks of a frozen policy, by true advantages and by gradient SNR.

A part is a training step without its update: walks of some prompts, the advantages that every method deals them, the
true value of every latent on the way (`credit_oracle`), and the gradient of every method (`credit_gradients`). Further
parts with plain gradients only sharpen what biases are measured against. Every part is written as it ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffalign import atomic, config
from diffalign.bench.credit_gradients import Influence, gradients
from diffalign.bench.credit_methods import COSTS, ORACLE, PLAIN, Credited, Method, Methods, costs, of_truth, schedule
from diffalign.bench.credit_oracle import OracleConfig, worth
from diffalign.budget import BACKWARD_COST
from diffalign.errors import ConfigError
from diffalign.judges.secrets import without_secrets
from diffalign.train import opening
from diffalign.train.adapters import AdapterConfig
from diffalign.train.job import Job
from diffalign.train.rollout import Rollout
from diffalign.train.settings import EvaluateConfig, TrainConfig

GROWS = ("parts", "reference")  # what may be raised when a run goes on


@dataclass(frozen=True, kw_only=True)
class CreditBench:
    """What is compared, on which walks."""

    methods: dict[str, Method]
    reward: tuple[str, ...] | dict[str, Any] | str
    split: Literal["train", "heldout", "hard"] | None = "train"
    prompts: str | None = None
    parts: int = 8  # training steps; intervals come from leaving out one after the other
    reference: int = 8  # further parts with the plain gradient only
    groups: int = 4  # prompts of a part
    group_size: int = 8
    micro_batch: int = 32
    sampling: dict[str, Any] = field(default_factory=dict)  # arguments of the call, over the model's card
    noise: dict[str, Any] = field(default_factory=dict)  # as an objective's `noise`
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(rank=4))
    precision: Literal["no", "bf16", "fp16"] = "no"
    oracle: OracleConfig = field(default_factory=OracleConfig)
    influence: bool = False  # gather THR too

    def __post_init__(self) -> None:
        if self.parts < 3:
            raise ConfigError(f"parts is {self.parts}, but an interval over parts needs at least 3. Use 8.")
        if self.groups < 1 or self.group_size < 2 or self.reference < 0:
            raise ConfigError(
                f"groups is {self.groups}, group_size {self.group_size} and reference {self.reference}, but a part has "
                "at least 1 group of 2 images, and reference counts parts."
            )

    @property
    def images(self) -> int:
        return self.groups * self.group_size


@dataclass
class Found:
    """The rows so far, with the folder of their gradients."""

    rows: list[dict[str, Any]]
    folder: Path

    def gradients(self, part: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "gradients" / f"part-{part}.safetensors")


def run(
    pipe: Any,
    told: CreditBench,
    *,
    model: str,
    call: Mapping[str, Any],
    seed: int,
    folder: Path,
    origin: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda parts: None,
) -> Found:
    """Fill `folder` with the parts that are not there yet; `advance` hears of each.

    `origin` is what the settings say besides, such as how the model was loaded.
    """
    methods = Methods(told.methods, told.noise)
    settings = {"model": model, **(origin or {}), "call": dict(call), "seed": seed, **config.plain(told)}
    _require_same(folder / "settings.json", without_secrets(settings))
    rows = read_rows(folder)
    done = {row["part"] for row in rows if (folder / "gradients" / f"part-{row['part']}.safetensors").exists()}
    rows = [row for row in rows if row["part"] in done]
    atomic.write_jsonl(folder / "rows.jsonl", rows)  # a kill may have cut the last line short
    with opened(pipe, told, model=model, call=call, seed=seed, folder=folder) as job:
        for part in numbers(told):
            if part not in done:
                row, tensors = measure(job, methods, told, part)
                _write(folder / "gradients" / f"part-{part}.safetensors", tensors)
                rows.append(row)
                with (folder / "rows.jsonl").open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(atomic.finite(row)) + "\n")
            advance(1)
    wanted = set(numbers(told))
    return Found(sorted((row for row in rows if row["part"] in wanted), key=lambda row: int(row["part"])), folder)


def numbers(told: CreditBench) -> list[int]:
    """Parts by number: even ones try all methods, odd ones the plain gradient, so that either may be raised."""
    return [2 * k for k in range(told.parts)] + [2 * k + 1 for k in range(told.reference)]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The parts so far; a line that a kill cut short is left out, and its part runs again."""
    file = folder / "rows.jsonl"
    rows: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["part"]] = row
    return list(rows.values())


def tensor(rows: Any) -> Tensor:
    """Nested lists of numbers as a float64 tensor; null is NaN."""
    return torch.from_numpy(np.array(rows, dtype=np.float64))


def _require_same(file: Path, told: dict[str, Any]) -> None:
    """Refuse to mix parts that were measured in different ways."""
    told = json.loads(json.dumps(told, default=str))
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else told
    for name in sorted((told.keys() | before.keys()) - set(GROWS)):
        if told.get(name) != before.get(name):
            raise ConfigError(
                f"'{file.parent}' holds parts measured with {name} = {before.get(name)}, and this run has "
                f"{told.get(name)}. Give another --out, or delete that folder."
            )
    atomic.write_json(file, told)


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


@contextmanager
def opened(
    pipe: Any, told: CreditBench, *, model: str, call: Mapping[str, Any], seed: int, folder: Path
) -> Iterator[Job]:
    """The job that a training with these settings would have, with its adapter attached for the length of the block."""
    settings = TrainConfig(
        reward=told.reward, split=told.split, prompts=told.prompts, groups=told.groups, group_size=told.group_size,
        micro_batch=told.micro_batch, sampling=told.sampling, adapter=told.adapter, precision=told.precision,
        evaluate=EvaluateConfig(limit=1, tower=None), trackers=(),
    )  # fmt: skip
    with opening.opened(pipe, settings, model=model, call=call, seed=seed, out=folder) as job:
        if job.listwise:
            raise ConfigError("a reward compares the images of a prompt, so a redrawn image has no reward of its own.")
        yield job


def measure(job: Job, methods: Methods, told: CreditBench, part: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The row of one part and its gradients by name."""
    cases = job.cases_of(part)
    with costs(job, len(cases)) as cost:
        rollouts, rewards = methods.walker.sampled(job, 0, cases)
    job.require_valid(rewards, part)
    row: dict[str, Any] = {
        "part": part,
        "prompts": [case.prompt for case in cases[:: told.group_size]],
        "rewards": job.total(rewards).tolist(),
        "trained": list(rollouts[0].trained),
        "walk": dict(cost),
        "learn": learning_nfe(rollouts[0]),
    }
    if part % 2:
        plain = methods.credited(job, rollouts, rewards, told.oracle.batch, only=PLAIN)
        return row, differentiate(job, methods, rollouts, plain, None)
    credited = methods.credited(job, rollouts, rewards, told.oracle.batch)
    if told.oracle.redraws:
        with costs(job, len(cases)) as cost:
            found = worth(job, rollouts, job.total(rewards), told.oracle)
        credited[ORACLE] = Credited(of_truth(job, found, rewards), "none", cost)
        row["worth"] = found.json()
    row["A"] = {name: each.A.tolist() for name, each in credited.items()}
    row["cost"] = {name: each.cost for name, each in credited.items()}
    seen = Influence(job) if told.influence else None
    tensors = differentiate(job, methods, rollouts, credited, seen)
    if seen is not None:
        row["thr"] = seen.thr(credited[PLAIN].A, job.group_ids).tolist()
    return row, tensors


def learning_nfe(rollout: Rollout) -> int:
    """What a training spends on the forward and backward passes of one walk."""
    return (1 + BACKWARD_COST) * sum(rollout.driver.costs[i] for i in rollout.trained)


def differentiate(
    job: Job, methods: Methods, rollouts: Sequence[Rollout], credited: Mapping[str, Credited], seen: Influence | None
) -> dict[str, Tensor]:
    """Gradients (D,) of every credit by its method's name, and those of the plain credit at each step, `steps` (S, D).

    Methods that differ in their weighting alone share the passes of the plain credit.
    """
    plain = credited[PLAIN].A
    apart = {name: each for name, each in credited.items() if name == PLAIN or not torch.equal(each.A, plain)}
    ordered = [PLAIN, *(name for name in apart if name != PLAIN)]
    A = torch.stack([credited[name].A for name in ordered])
    weights = torch.stack([methods.step_weights(rollouts[0], credited[name].weighting) for name in ordered])
    with seen.hooked() if seen is not None else nullcontext():
        found, steps = gradients(job, rollouts, A, weights, methods.walker.config.density, look=seen)
    told = dict(zip(ordered, found, strict=True))
    for name, each in credited.items():
        if name not in told:
            told[name] = (methods.step_weights(rollouts[0], each.weighting)[:, None] * steps).sum(0)
    return {**told, "steps": steps}


def completed(found: Found, methods: Mapping[str, Method]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Advantages (K, N, S) and gradients (K, D) by method of the parts that try all, averaged controls included."""
    rows = [row for row in found.rows if "A" in row]
    A = {name: tensor([row["A"][name] for row in rows]).float() for name in rows[0]["A"]}
    tensors = [found.gradients(row["part"]) for row in rows]
    g = {name: torch.stack([each[name] for each in tensors]) for name in A}
    for name, method in methods.items():
        if method.control == "averaged":
            w = schedule(A[method.of].flatten(0, 1), A[PLAIN].flatten(0, 1))
            A[name] = A[PLAIN] * w
            g[name] = torch.stack([(w[:, None] * each["steps"]).sum(0) for each in tensors])
    return A, g


def price(found: Found, methods: Mapping[str, Method], name: str) -> dict[str, float]:
    """What one walk of a training with this method costs: nfe, decodes and reward calls; a schedule is free."""
    rows = [row for row in found.rows if "A" in row]
    of = methods[name].of if name in methods and methods[name].control == "shuffled" else name
    each = {cost: sum(row["walk"][cost] + row["cost"].get(of, {}).get(cost, 0.0) for row in rows) for cost in COSTS}
    each["nfe"] += sum(row["learn"] for row in rows)
    return {cost: value / len(rows) for cost, value in each.items()}
