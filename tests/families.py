"""Measure every tiny family and write docs/families.md: `python -m tests.families`."""

from __future__ import annotations

from pathlib import Path

import torch

from diffalign.conformance import CAPABILITIES, Capability, Conformance, check
from diffalign.drive import Driver
from diffalign.noise import ddim
from diffalign.recording import difference
from tests.tiny import FAMILIES, build, call

PAGE = Path(__file__).parents[1] / "docs" / "families.md"

HEAD = """# Families

Every row is a pipeline of the real diffusers classes with tiny seeded random weights, tried by `diffalign check` on a
CPU (`python -m tests.families` measures and writes this page; `tests/test_families.py` holds it to the code). `0`
means bit for bit; `-` means there is nothing to measure. No line of the seam names a family.

- **predict, index, guidance**: what our predict returns against what the stock scheduler was handed, at every step,
  in order, in reverse order, and at another guidance scale.
- **gradient**: the image of the undecorated call against the stock image (torch may choose other kernels when it
  tracks gradients).
- **rollout, decode**: our loop control with the stock scheduler's steps, and decoding alone, against the stock image.
- **mid-chain, replay**: a walk resumed in its middle; log-densities replayed against those recorded.
- **adapters**: the base model with adapters off against the model before it had any. **offload**: with model-offload
  hooks.
- **deterministic**: the image of our own deterministic steps against the stock image. It is rounding for samplers
  that are first-order and deterministic (DDIM, Euler, flow Euler); multistep, second-order and stochastic samplers
  differ by design.
- **alone vs batch**: one case alone against the same case in a batch of two, with our transitions. The noise is the
  same bits; what is left is torch choosing other kernels for other batch sizes.

"""

COLUMNS = [c for c in CAPABILITIES if c not in ("schedule", "restore")]


def alone_versus_batch(name: str) -> float | None:
    """Largest difference of the second case of two, alone and in the batch; None where there is no batch."""
    family = FAMILIES[name]
    if not family.batch or family.stray_noise:
        return None
    generators = [torch.Generator().manual_seed(s) for s in (3, 17)]
    driver = Driver(build(name), **call(name, 2), generator=generators)
    single = driver.select([1])
    together = driver.rollout(ddim(0.5), quiet=True).media
    return difference(torch.as_tensor(together)[1:], single.rollout(ddim(0.5), quiet=True).media)


def measure(name: str) -> tuple[Conformance, float | None]:
    return check(build(name), **call(name)), alone_versus_batch(name)


def row(name: str, report: Conformance, alone: float | None) -> str:
    """One line of the table."""
    cells = [name, report.pipeline.removesuffix("Pipeline"), str(report.notes["scheduler"]).removesuffix("Scheduler")]
    cells += ["yes" if report.capabilities[c].ok else "**no**" for c in ("schedule", "restore")]
    cells += [_cell(report.capabilities[c]) for c in COLUMNS]
    return "| " + " | ".join([*cells, _number(report.notes["deterministic"]), _number(alone)]) + " |"


def _cell(capability: Capability) -> str:
    return _number(capability.error) if capability.ok else f"**no**: {capability.reason}"


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}" if error else "0"


def page() -> str:
    titles = ["family", "pipeline", "scheduler", "schedule", "restore", *COLUMNS, "deterministic", "alone vs batch"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += [row(name, *measure(name)) for name in FAMILIES if not FAMILIES[name].broken]
    return HEAD + "\n".join(lines) + "\n" + notes()


def notes() -> str:
    """Reasons for what a stock pipeline cannot do."""
    lines = [f"- **{n}**: no batch: {f.reason}" for n, f in FAMILIES.items() if not f.batch]
    lines += [
        f"- **{n}**: draws from torch's global generator too, so a batch shares that noise."
        for n, f in FAMILIES.items()
        if f.stray_noise
    ]
    lines += [f"- **{n}**: cannot run: {f.broken}" for n, f in FAMILIES.items() if f.broken]
    return "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(), encoding="utf-8")
