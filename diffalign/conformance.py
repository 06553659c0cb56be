"""Does the seam hold on this pipeline? One verdict per capability, with the largest error, before anybody relies on it.

Everything is compared with a recorded stock run of the same seeds. Errors are absolute differences; a stock pipeline
that does not repeat itself bit for bit on this device sets the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.borrowed import offload_hooks, temporary_lora
from diffalign.drive import grad_call
from diffalign.errors import DiffalignError, SeamError
from diffalign.noise import ddim
from diffalign.recording import Recorder, difference
from diffalign.restore import frozen, steady
from diffalign.snapshot import differences, snapshot

CAPABILITIES = (
    "schedule",
    "predict",
    "index",
    "guidance",
    "gradient",
    "rollout",
    "mid-chain",
    "decode",
    "replay",
    "restore",
    "adapters",
    "offload",
)


@dataclass(frozen=True)
class Capability:
    """Whether it holds, the largest error where one was measured, and what stands behind the verdict."""

    ok: bool
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Conformance:
    """The report of one pipeline."""

    pipeline: str
    capabilities: Mapping[str, Capability]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.capabilities.values())

    def json(self) -> dict[str, Any]:
        """The stable machine-readable form."""
        rows = {k: {"ok": c.ok, "error": _finite(c.error), "reason": c.reason} for k, c in self.capabilities.items()}
        return {"pipeline": self.pipeline, "capabilities": rows}

    def table(self) -> str:
        """The human-readable form, one line per capability."""
        rows = [
            f"{k:<10} {'pass' if c.ok else 'FAIL'}  {_number(c.error):>8}  {c.reason}".rstrip()
            for k, c in self.capabilities.items()
        ]
        return "\n".join([self.pipeline, *rows])


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}" if error else "0"


def check(pipe: Any, *, on_capability: Callable[[str], None] = lambda _: None, **call: Any) -> Conformance:
    """Try every capability of the seam on `pipe` with the arguments of a stock call, and report each."""
    trial = Trial(pipe, call)
    results = {}
    for name in CAPABILITIES:
        on_capability(name)
        results[name] = _attempt(getattr(trial, name.replace("-", "_")))
    notes = {
        "denoiser": trial.driver.denoiser,
        "latents": "handed in" if trial.driver._takes_latents else "given back by a blank step",
        "deterministic": trial.deterministic,
        "scheduler": type(pipe.scheduler).__name__,
    }
    return Conformance(type(pipe).__name__, results, notes)


def _attempt(run: Callable[[], Capability]) -> Capability:
    try:
        return run()
    except DiffalignError as e:
        return Capability(False, None, str(e))
    except Exception as e:
        return Capability(False, None, f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}")


class Trial(Recorder):
    """One pipeline under test: its stock runs, and one method per capability."""

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        super().__init__(pipe, call)
        self.before = snapshot(pipe)  # after a stock run: text encoders set up hooks of their own the first time
        self.driver = self.new_driver()
        again = self.record(self.call)
        self.deterministic = float("nan")  # our DDIM steps against the stock image
        self.floor = max(
            [difference(self.stock.media, again.media), *map(difference, self.stock.predictions, again.predictions)]
        )

    def verdict(self, error: float, reason: str = "") -> Capability:
        return Capability(error <= self.floor, error, reason)

    # one method per capability

    def schedule(self) -> Capability:
        ours, theirs = self.driver.timesteps, self.stock.timesteps
        if len(ours) != len(theirs):
            return Capability(
                False,
                None,
                f"the loop walks over {len(ours)} timesteps, the stock scheduler is asked for {len(theirs)}",
            )
        error = max(abs(float(a) - float(torch.as_tensor(b).flatten()[0])) for a, b in zip(ours, theirs, strict=True))
        return self.verdict(error, f"{len(ours)} steps")

    def predict(self) -> Capability:
        error = max(
            difference(self.driver.predict(x, i), self.stock.predictions[i]) for i, x in enumerate(self.stock.samples)
        )
        return self.verdict(max(error, difference(self.driver.start(), self.stock.samples[0])))

    def index(self) -> Capability:
        driver = self.new_driver()
        order = reversed(list(enumerate(self.stock.samples)))
        error = max(difference(driver.predict(x, i), self.stock.predictions[i]) for i, x in order)
        return self.verdict(
            error, "through blank iterations" if driver._hides_index else "through the loop's enumerate"
        )

    def guidance(self) -> Capability:
        name = next((n for n in ("guidance_scale", "true_cfg_scale") if n in self.call), "guidance_scale")
        if name not in self.driver._known:
            return Capability(True, None, "the pipeline has no guidance argument")
        default = self.driver._known[name].default
        other = {name: float(self.call.get(name, default if isinstance(default, int | float) else 3.0)) + 1.5}
        stock, driver = self.record({**self.call, **other}), self.new_driver(**other)
        error = max(difference(driver.predict(x, i), stock.predictions[i]) for i, x in enumerate(stock.samples))
        rows = driver._watch.last_rows / driver.batch
        return self.verdict(error, f"{rows:g} rows per image and step")

    def gradient(self) -> Capability:
        x = self.driver.start().requires_grad_()
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        prediction = self.driver.predict(x, 0, grad=True)
        weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(2)).to(prediction)
        (slope,) = torch.autograd.grad((prediction * weights).sum(), x)
        with steady(self.driver.modules.values()):
            media = _tensor_with_gradient(self.driver.decode(x, grad=True))
            (pixels,) = torch.autograd.grad(media.float().mean(), x)
        if not (slope.isfinite().all() and slope.any() and pixels.isfinite().all()):
            return Capability(False, None, "the gradient to the latent is zero or not finite")
        with self.same_stray_noise(), frozen(self.driver.modules.values()):
            same = difference(grad_call(self.pipe, **self.stock_arguments(self.call))[0], self.stock.media)
        along = float((slope.double() * direction).sum())
        relative = self._slope_error(x.detach(), direction, weights, along)
        reason = (
            f"directional derivative within {relative:.1e} of differences; error: image with gradients against stock"
        )
        return Capability(
            relative < 0.05 and same <= max(self.floor, 1e-5), same, reason
        )  # torch may pick other kernels in grad mode

    def _slope_error(self, x: Tensor, direction: Tensor, weights: Tensor, along: float) -> float:
        """Relative gap between autograd and central differences, best of three step sizes; low precision has none."""
        if x.dtype in (torch.float16, torch.bfloat16):
            return 0.0
        gaps = []
        for h in (1e-1, 1e-2, 1e-3):
            up, down = (self.driver.predict(x + s * h * direction, 0).double() for s in (1, -1))
            gaps.append(abs(float(((up - down) * weights).sum()) / (2 * h) - along) / max(abs(along), 1e-6))
        return min(gaps)

    def rollout(self) -> Capability:
        error = difference(self.driver.rollout(quiet=True).media, self.stock.media)
        self.deterministic = difference(self.driver.rollout(ddim(0.0), quiet=True).media, self.stock.media)
        return self.verdict(
            error, f"our deterministic steps differ from the stock sampler's image by {self.deterministic:.1e}"
        )

    def mid_chain(self) -> Capability:
        middle, kernel = self.driver.length // 2, ddim(0.5)
        whole = self.driver.rollout(kernel, quiet=True)
        tail = self.driver.rollout(kernel, x=whole.latents[middle], start=middle, quiet=True)
        return self.verdict(difference(tail.media, whole.media), f"from step {middle} of {self.driver.length}")

    def decode(self) -> Capability:
        walk = self.driver.rollout(quiet=True)
        return self.verdict(difference(self.driver.decode(walk.latents[-1]), self.stock.media))

    def replay(self) -> Capability:
        kernel = ddim(0.5)
        walk = self.driver.rollout(kernel, quiet=True)
        assert walk.log_probs is not None
        return self.verdict(
            difference(self.driver.replay(walk, kernel, grad=False), walk.log_probs),
            "log-densities, replayed in one call",
        )

    def restore(self) -> Capability:
        changed = differences(self.before, snapshot(self.pipe))
        try:
            self.driver.predict(torch.full_like(self.driver.start(), float("nan")), 0)
        except DiffalignError:
            pass
        else:
            return Capability(False, None, "NaN latents went through without an error")
        changed += differences(self.before, snapshot(self.pipe))
        return Capability(
            not changed, None, f"changed: {', '.join(changed[:5])}" if changed else "also after a call that raised"
        )

    def adapters(self) -> Capability:
        module = self.driver.modules[self.driver.denoiser or ""]
        x, base = self.stock.samples[0], self.stock.predictions[0]
        with temporary_lora(module) as count:
            if not count:
                return Capability(False, None, f"no linear layer of {type(module).__name__} takes a LoRA")
            driver = self.new_driver()
            adapted = driver.predict(x, 0)
            with driver.reference():
                error = difference(driver.predict(x, 0), base)
            error = max(error, difference(driver.predict(x, 0), adapted))
            moved = difference(adapted, base)
        if not moved:
            return Capability(False, error, "an adapter on the denoiser changes nothing")
        return self.verdict(error, "base model with adapters off, adapter back on after")

    def offload(self) -> Capability:
        driver = self.new_driver()
        with offload_hooks(self.pipe) as entries:
            driver.start()
            once = dict(entries)
            error = max(
                difference(driver.predict(x, i), self.stock.predictions[i]) for i, x in enumerate(self.stock.samples)
            )
            error = max(error, difference(driver.rollout(quiet=True).media, self.stock.media))
            driver.close()
        heavy = {k: n for k, n in entries.items() if "text_encoder" in k}
        if any(n > once[k] for k, n in heavy.items()):
            return Capability(False, error, f"encoders ran again and again: {heavy}")
        return self.verdict(error, "each text encoder ran once a prompt" if heavy else "no text encoder")


def _tensor_with_gradient(media: Any) -> Tensor:
    if isinstance(media, list):
        media = torch.stack(media)
    if not isinstance(media, Tensor):
        raise SeamError(f"the pipeline gives {type(media).__name__} for output_type='pt', which carries no gradient.")
    return media
