"""`diffalign bench rewards`: how often rewards agree with people."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.data.judged import Verdict
    from diffalign.data.preferences import Comparison


@dataclass(frozen=True, kw_only=True)
class Rewards(Verb):
    """Compare rewards with human preferences: accuracy by the data's own protocol, and with half credit for ties.

    Reads Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB, EditReward-Bench, votes of a gallery, and plain rows of prompt,
    images and ranks, as JSONL, JSON, CSV or parquet. Numbers of two protocols must not be compared. Scores are kept
    in OUT/scores.sqlite, so the same command goes on after a stop.

    Writes OUT/rows.jsonl (a line per comparison, null where a score is invalid), table.md and card.json.

    \b
    diffalign bench rewards votes.jsonl --reward clip
    diffalign bench rewards HPDv2/test.json --reward clip --reward jpeg_size --limit 200
    diffalign bench rewards 'pickapic/test_unique-*' --validation 'pickapic/validation_unique-*' --scale 100
    """

    NAME: ClassVar[str] = "rewards"
    file: Annotated[str, Opt("Preferences: a file, a folder of parquet shards, or a pattern.", positional=True)]
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("Reward; repeat to compare.", flag="-r")] = ("clip",)
    format: Annotated[str | None, Opt("Format of the file; told from its columns by default.")] = None
    images: Annotated[str | None, Opt("Folder where the paths of images start.")] = None
    protocol: Annotated[tuple[str, ...], Opt("Protocol; repeat it. The data's own and `half` by default.")] = ()
    validation: Annotated[str | None, Opt("Preferences to pick the tie threshold of `pickapic` on.")] = None
    scale: Annotated[float, Opt("What makes a score a logit in `pickapic`; 100 for a cosine of CLIP.")] = 1.0
    seen: Annotated[str | None, Opt("Prompts that a reward was trained on; those in FILE are counted.")] = None
    limit: Annotated[int | None, Opt("Only the first N comparisons.")] = None
    batch: Annotated[int, Opt("Images scored at once.")] = 16
    device: Annotated[str, Opt("Where rewards run.")] = "cpu"
    cache: Annotated[str | None, Opt("SQLite file of scores; OUT/scores.sqlite by default.")] = None
    out: Annotated[str | None, Opt("Folder for rows, table and card.")] = "out/bench_rewards"

    def __post_init__(self) -> None:
        from diffalign.data.accuracy import PROTOCOLS

        for name, value in (("batch", self.batch), ("limit", self.limit), ("scale", self.scale)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}, but it must be above 0.")
        if unknown := [name for name in self.protocol if name not in PROTOCOLS]:
            raise ConfigError(f"no protocol called '{unknown[0]}'. Known: {', '.join(PROTOCOLS)}.")

    def cost(self) -> dict[str, Any]:
        counts = [len(one.pictures) for one in self.comparisons(self.file, self.limit)]
        return {"comparisons": len(counts), "images": sum(counts), "reward_calls": sum(counts) * len(self.reward)}

    def run(self) -> dict[str, Any]:
        from diffalign import atomic, scoring
        from diffalign.cli.model import quiet_libraries

        folder = atomic.require_folder(self.out or "out/bench_rewards")
        quiet_libraries()
        protocols, rewards = self.named()[1], _each(self.reward)
        cache = scoring.ScoreCache(self.cache or folder / "scores.sqlite")
        thresholds = self.thresholds(rewards, cache) if "pickapic" in protocols else {}
        verdicts = self.verdicts(self.file, self.limit, rewards, cache)
        table = [row for r in rewards for row in self.table(r.name, verdicts, protocols, thresholds.get(r.name, 0.0))]
        card = self.card(rewards, verdicts)
        atomic.write_jsonl(folder / "rows.jsonl", (verdict.json() for verdict in verdicts))
        atomic.write_json(folder / "card.json", card)
        atomic.write_text(folder / "table.md", _markdown(table))
        _print(table, card)
        print(f"each comparison: {folder}/rows.jsonl")
        return {"rows": table, "card": card}

    def comparisons(self, file: str, limit: int | None) -> Iterator[Comparison]:
        from diffalign.data.preferences import read_comparisons

        return itertools.islice(read_comparisons(file, self.format, images=self.images), limit)

    def named(self) -> tuple[str, list[str]]:
        """The format and the protocols, the data's own first."""
        from diffalign.data.preference_formats import FORMATS
        from diffalign.data.preferences import sniff

        name = self.format or sniff(self.file)
        if name not in FORMATS:
            raise ConfigError(f"no preference format called '{name}'. Known: {', '.join(FORMATS)}.")
        return name, list(dict.fromkeys(self.protocol or (FORMATS[name].protocol, "half")))

    def verdicts(self, file: str, limit: int | None, rewards: Sequence[Any], cache: Any) -> list[Verdict]:
        """What the rewards say of each comparison in a file."""
        import torch

        from diffalign import scoring
        from diffalign.data.judged import judge

        ask = partial(scoring.score, chunk=self.batch, cache=cache, all_invalid=True)
        with torch.no_grad(), _progress(limit) as advance:
            found = self.comparisons(file, limit)
            return judge(found, rewards, ask, batch=self.batch, device=self.device, advance=advance)

    def thresholds(self, rewards: Sequence[Any], cache: Any) -> dict[str, float]:
        """The tie threshold of each reward, picked on the validation data if there is any."""
        from diffalign.data.accuracy import pick_threshold

        if self.validation is None:
            return {}
        verdicts = self.verdicts(self.validation, None, rewards, cache)
        return {r.name: pick_threshold([v.judged(r.name) for v in verdicts], scale=self.scale) for r in rewards}

    def table(
        self, reward: str, verdicts: Sequence[Verdict], protocols: Sequence[str], threshold: float
    ) -> list[dict[str, Any]]:
        """A row per protocol, and per aspect where people judged several."""
        from diffalign.data.accuracy import measure

        found = []
        for aspect in dict.fromkeys(verdict.aspect for verdict in verdicts):
            judged = [verdict.judged(reward) for verdict in verdicts if verdict.aspect == aspect]
            for protocol in protocols:
                result = measure(protocol, judged, threshold=threshold, scale=self.scale, seed=self.seed)
                told = {"threshold": threshold} if protocol == "pickapic" else {}
                found.append({"reward": reward, "aspect": aspect, **result.json(), **told})
        return found

    def card(self, rewards: Sequence[Any], verdicts: Sequence[Verdict]) -> dict[str, Any]:
        """What must agree before two such tables may be compared, and what casts doubt on this one."""
        from diffalign.bench.card import hash_prompts, versions
        from diffalign.data.preferences import overlap
        from diffalign.data.prompt_sets import read_prompts
        from diffalign.scoring import leaves

        cases = [verdict.case for verdict in verdicts]
        train = [case.prompt for case in read_prompts(self.seen)] if self.seen else None
        return {
            "data": self.file,
            "format": self.named()[0],
            "comparisons": len(verdicts),
            "prompts": hash_prompts(cases),
            "limit": self.limit,
            "scale": self.scale,
            "rewards": {reward.name: {leaf.name: leaf.version for leaf in leaves(reward)} for reward in rewards},
            "seen": None if train is None else len(overlap(train, (case.prompt for case in cases))),
            "unreadable": sum(verdict.unreadable for verdict in verdicts),
            "versions": versions(),
        }


def _each(spec: Any) -> list[Any]:
    """One reward per line of the table; their weights play no part here."""
    from diffalign.scoring import WeightedReward, make_reward

    made = make_reward(spec)
    return made.rewards if isinstance(made, WeightedReward) else [made]


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], Any]]:
    """A bar on stderr, also where nobody knows how much there is."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="comparisons", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.update


HEADS = (
    "reward",
    "protocol",
    "accuracy",
    "95 % interval",
    "prompts",
    "pairs",
    "ties in labels",
    "ties in scores",
    "invalid",
)


def _cells(row: dict[str, Any]) -> list[str]:
    protocol = row["protocol"] + (f", t = {row['threshold']:.1f}" if "threshold" in row else "")
    found, pairs = row["accuracy"], row["pairs"]
    shown = [f"{found['mean']:.1%}", f"{found['lo']:.1%} to {found['hi']:.1%}"] if found else ["-", "-"]
    ties = [f"{row[name] / pairs:.1%}" if pairs else "-" for name in ("label_ties", "score_ties")]
    named = f"{row['reward']}: {row['aspect']}" if row["aspect"] else row["reward"]
    return [named, protocol, *shown, str(row["prompts"]), str(pairs), *ties, str(row["invalid"])]


def _markdown(table: Sequence[dict[str, Any]]) -> str:
    lines = [HEADS, ["---"] * len(HEADS), *(_cells(row) for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _print(table: Sequence[dict[str, Any]], card: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(*HEADS, box=SIMPLE_HEAD)
    for row in table:
        shown.add_row(*_cells(row))
    Console().print(shown)
    print("rows of two protocols must not be compared; pairs with an invalid score are left out and counted")
    if card["unreadable"]:
        print(f"{card['unreadable']} comparisons have a picture that cannot be opened")
    if card["seen"]:
        print(f"warning: {card['seen']} prompts are also among those a reward was trained on", file=sys.stderr)
