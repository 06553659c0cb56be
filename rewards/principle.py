"""How well pictures keep to a principle in free text, rated beside each other.

Zhuohao Yu et al.: "RewardAnything: Generalizable Principle-Following Reward Models", 2025 (arXiv 2506.03637). One
question shows the candidates of a prompt under neutral names in shuffled order; the reply has a score from 1 to 5 for
each and their ranking.

Where we differ:
- Candidates are pictures, at most `group` of them a question; a larger group is split evenly and each piece rated by
  itself. Without other pictures of its prompt a picture is rated alone, and `group: 1` always does so.
- The score is the mean over `orders` orders. Their shuffle depends on prompt and principle only and leaves the global
  generator alone; the published client seeds that anew with 42 at every call, so that the order is always the same.
- A reply needs a score from 1 to 5 for every picture, fractions too; one that cannot be read twice leaves its order
  out. The ranking may be missing or contradict the scores: `consistent` is the share of orders where it agrees.
- A picture's score depends on those beside it, so that nothing is cached unless `group` is 1. Whoever scores in chunks
  should keep the pictures of one prompt in one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffalign import vision
from diffalign.cases import Case, derived_seed
from diffalign.errors import ConfigError
from diffalign.judges import wording as words
from diffalign.judges.asking import LARGEST_SEED, Backend, Judgement, Question, ask
from diffalign.judges.finding import EMBEDDED
from diffalign.judges.parse import number, read_object
from diffalign.judges.protocols import OURS, read_wording
from diffalign.judges.rewarding import JudgeReward
from diffalign.judges.rubric_files import read_principle
from diffalign.judges.rubric_writing import key_of
from diffalign.registry import register_reward
from diffalign.rules.ranking import arrangement, is_ranked

LOW, HIGH = 1.0, 5.0
DEFAULT = "it shows what the words say, nothing less and nothing more"
UNREAD = "no reply gave every picture a score from 1 to 5"


@dataclass(frozen=True)
class Said:
    """One reply: the scores in the order of the names, and whether its ranking agrees with them."""

    scores: tuple[float, ...]
    consistent: bool


@register_reward("principle", range=(LOW, HIGH))
class PrincipleReward(JudgeReward):
    """`principle` is free text or a file (.yaml, .txt, .md); parts: `consistent`, `orders` read, `beside` it rated."""

    def __init__(
        self,
        judge: str | Mapping[str, Any] | Backend = EMBEDDED,
        log: str | None = None,
        *,
        principle: str = DEFAULT,
        group: int = 4,
        orders: int = 2,
        temperature: float = 0.0,
        wording: str = OURS,
    ) -> None:
        super().__init__(judge, log)
        if group < 1 or orders < 1 or not 0 <= temperature <= 2:
            raise ConfigError(
                f"principle has group {group}, orders {orders} and temperature {temperature}; the first two are at "
                "least 1, the temperature is from 0 to 2."
            )
        self.principle = read_principle(principle)
        self.group, self.orders, self.temperature = group, orders, temperature
        self.wording = read_wording(wording, {"principle": words.PRINCIPLE}, self.name)
        self.listwise = group > 1  # whether a row's score depends on the others of its prompt
        self.revision = f"1 {self.wording.mark} {self.principle.id}"
        self.options = self.judge_options | {"principle": self.principle.principle, "group": group, "orders": orders}
        self.options |= {"temperature": temperature, "wording": wording}

    @property
    def version(self) -> str | None:
        """None where a score depends on the other rows of a call, so that it is not cached."""
        return None if self.listwise else super().version

    def judge(self, media: Tensor, cases: Sequence[Case]) -> list[Judgement]:
        pictures = vision.quantise(media)
        shown = [(rows, order) for rows in self._pieces(cases) for order in self._orders(rows, cases)]
        replies: dict[int, tuple[Said | None, tuple[str, ...]]] = {}
        for count in sorted({len(rows) for rows, _ in shown}):  # a reply is read by how many pictures it is about
            places = [place for place, (rows, _) in enumerate(shown) if len(rows) == count]
            asked = [self._question(*shown[place], pictures, cases) for place in places]

            def read(text: str, count: int = count) -> Said | None:
                return read_reply(text, count)

            replies |= dict(zip(places, ask(self.backend, asked, read), strict=True))
        scores: list[list[float]] = [[] for _ in cases]
        agreed: list[list[bool]] = [[] for _ in cases]
        raw: list[tuple[str, ...]] = [(self.principle.label,) for _ in cases]
        beside = [1] * len(cases)
        for place, (rows, order) in enumerate(shown):
            said, texts = replies[place]
            for name, k in enumerate(order):
                row, beside[rows[k]] = rows[k], len(rows)
                raw[row] += (f"{self._turn(name)} in:", *texts)
                if said is not None:
                    scores[row].append(said.scores[name])
                    agreed[row].append(said.consistent)
        return [_judged(*row) for row in zip(scores, agreed, beside, raw, strict=True)]

    def _pieces(self, cases: Sequence[Case]) -> list[list[int]]:
        """The rows that are rated together: those of one prompt and source, in pieces of nearly one size."""
        most = max(1, min(self.group, self.backend.most_images))
        groups: dict[tuple[str, str, str], list[int]] = {}
        for k, case in enumerate(cases):
            groups.setdefault(key_of(case), []).append(k)
        pieces = []
        for rows in groups.values():
            count = math.ceil(len(rows) / most)
            pieces += [rows[len(rows) * k // count : len(rows) * (k + 1) // count] for k in range(count)]
        return pieces

    def _orders(self, rows: Sequence[int], cases: Sequence[Case]) -> list[list[int]]:
        """The orders a piece is shown in; a picture alone has one."""
        about = cases[rows[0]].prompt, self.principle.principle
        return [arrangement(len(rows), turn, *about) for turn in range(self.orders if len(rows) > 1 else 1)]

    def _question(self, rows: Sequence[int], order: Sequence[int], pictures: Tensor, cases: Sequence[Case]) -> Question:
        names = ", ".join(self._turn(k) for k in range(len(order)))
        prompt = cases[rows[0]].prompt
        text = self.wording.say("principle", names=names, prompt=prompt, principle=self.principle.principle)
        images = tuple(pictures[rows[k]] for k in order)
        seed = derived_seed(0, "principle", prompt, *order) & LARGEST_SEED
        return Question(
            text=text, images=images, temperature=self.temperature, seed=seed, max_tokens=128 + 64 * len(order)
        )

    @staticmethod
    def _turn(k: int) -> str:
        return f"picture-{k + 1}"


def read_reply(text: str, count: int) -> Said | None:
    """The scores of picture-1 to picture-`count`, None where one is missing, unasked for or no number from 1 to 5."""
    found = read_object(text)
    given = None if found is None else found.get("scores")
    names = [f"picture-{k + 1}" for k in range(count)]
    if found is None or not isinstance(given, Mapping) or set(given) != set(names):
        return None
    scores = [number(given[name], LOW, HIGH) for name in names]
    read = tuple(score for score in scores if score is not None)
    if len(read) < count:
        return None
    return Said(read, is_ranked(dict(zip(names, read, strict=True)), found.get("best-to-worst")))


def _judged(scores: Sequence[float], agreed: Sequence[bool], beside: int, raw: tuple[str, ...]) -> Judgement:
    if not scores:
        return Judgement(raw=raw, problem=UNREAD)
    parts = {"consistent": sum(agreed) / len(agreed), "orders": float(len(scores)), "beside": float(beside)}
    return Judgement(math.fsum(scores) / len(scores), parts, raw)
