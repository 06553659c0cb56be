"""Comparisons with what rewards say of their pictures, some pictures at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffalign import vision
from diffalign.cases import Case
from diffalign.data.accuracy import Judged
from diffalign.data.preferences import Comparison
from diffalign.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Ask = Callable[[Any, "Tensor", Sequence[Case]], Any]  # (reward, media (B, 3, H, W), cases) -> its Score
Waiting = tuple["Verdict", int, Case, "Image.Image"]  # the picture in place `int` of a comparison


@dataclass(kw_only=True)
class Verdict:
    """A comparison without its pictures: what people say, and what each reward scores, None where it cannot."""

    case: Case
    ranks: Sequence[int]
    group: str
    kind: str
    aspect: str
    unreadable: bool = False  # a picture could not be opened
    scores: dict[str, list[float | None]] = field(default_factory=dict)

    def judged(self, reward: str) -> Judged:
        scores = [float("nan") if score is None else score for score in self.scores[reward]]
        return Judged(ranks=self.ranks, scores=scores, group=self.group, kind=self.kind)

    def json(self) -> dict[str, Any]:
        told = {"prompt": self.case.prompt, "ranks": list(self.ranks), "scores": self.scores, "group": self.group}
        return told | {name: value for name in ("kind", "aspect", "unreadable") if (value := getattr(self, name))}


def judge(
    comparisons: Iterable[Comparison],
    rewards: Sequence[Any],
    ask: Ask,
    *,
    batch: int = 16,
    device: str = "cpu",
    advance: Callable[[int], Any] = lambda count: None,
) -> list[Verdict]:
    """One verdict per comparison; with a picture that cannot be opened it is invalid, with no other it is an error."""
    verdicts: list[Verdict] = []
    waiting: list[Waiting] = []
    broken: MediaError | None = None
    for one in comparisons:
        verdict = Verdict(case=one.case, ranks=one.ranks, group=one.group, kind=one.kind, aspect=one.aspect)
        verdict.scores = {reward.name: [None] * len(one.ranks) for reward in rewards}
        verdicts.append(verdict)
        try:
            case = one.asked()
            waiting += [(verdict, place, case, image) for place, image in enumerate(one.images(case.source))]
        except MediaError as e:
            verdict.unreadable, broken = True, broken or e
        if len(waiting) >= batch:
            _score(waiting, rewards, ask, device)
            waiting.clear()
        advance(1)
    _score(waiting, rewards, ask, device)
    if broken is not None and all(verdict.unreadable for verdict in verdicts):
        raise broken
    return verdicts


def _score(waiting: Sequence[Waiting], rewards: Sequence[Any], ask: Ask, device: str) -> None:
    """Fill in the scores: each size on its own, an aspect by the part of its name where a reward has one."""
    for size in dict.fromkeys(image.size for *_, image in waiting):
        some = [entry for entry in waiting if entry[3].size == size]
        media, cases = vision.to_tensor([image for *_, image in some]).to(device), [case for _, _, case, _ in some]
        for reward in rewards:
            found = ask(reward, media, cases)
            for row, (verdict, place, _, _) in enumerate(some):
                names = (verdict.aspect, f"{reward.name}/{verdict.aspect}")
                part = next((found.parts[name] for name in names if name in found.parts), found.total)
                value = float(part[row])
                sound = bool(found.valid[row]) and value == value
                verdict.scores[reward.name][place] = value if sound else None
