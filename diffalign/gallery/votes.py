"""Votes: one line of JSON per choice between two pictures, merged over files and people; see docs/gallery.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from diffalign.errors import ConfigError
from diffalign.gallery import compare, rows
from diffalign.intervals import bootstrap

FORMAT, VERSION = "diffalign-votes", 1
Choice = Literal["a", "b", "tie"]
SIGN = {"a": -1, "b": 1, "tie": 0}


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One choice between the pictures of two systems; also a preference pair to train on."""

    page: str  # id of the gallery's manifest
    entry: str
    prompt: str
    a: str
    b: str
    a_path: str | None
    b_path: str | None
    choice: Choice
    left: Literal["a", "b"]
    blind: bool
    voter: str
    at: str  # ISO 8601, UTC

    @property
    def who(self) -> tuple[str, str, str, str, str]:
        """What a later vote with the same replaces."""
        return self.voter, self.page, self.entry, self.a, self.b

    def json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def read(file: Path) -> list[Vote]:
    """The votes of a file that a page exported or a merge wrote."""
    return [_vote(row, where) for where, row in rows.read_lines(file, "Give the JSONL files that a gallery exported.")]


def merged(files: Sequence[Sequence[Vote]]) -> list[Vote]:
    """All votes; of several by one voter on the same pictures the latest counts."""
    latest: dict[tuple[str, ...], Vote] = {}
    for vote in sorted((vote for votes in files for vote in votes), key=lambda vote: vote.at):
        latest[vote.who] = vote
    return sorted(latest.values(), key=lambda vote: (vote.page, vote.entry, vote.voter, vote.at))


def results(votes: Sequence[Vote], manifest: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """For every two systems: who won, whether chance would do, whether people agree, and which rewards do.

    Pages are told apart; with a manifest only its own votes count. Votes given with names and scores in sight are left
    out; the page counts alike.
    """
    pairs: dict[tuple[str, str, str], list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.blind and (manifest is None or vote.page == manifest["id"]):
            pairs[vote.page, vote.a, vote.b].append(vote)
    return [{"page": page} | _result(a, b, found, manifest) for (page, a, b), found in sorted(pairs.items())]


def _result(a: str, b: str, votes: list[Vote], manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    counts = {choice: sum(vote.choice == choice for vote in votes) for choice in get_args(Choice)}
    per_entry: dict[str, list[int]] = defaultdict(list)
    for vote in votes:
        per_entry[vote.entry].append(SIGN[vote.choice])
    share = compare.share(counts["b"], counts["a"])
    rate = bootstrap([(sum(signs) / len(signs) + 1) / 2 for signs in per_entry.values()])
    return {
        "a": a,
        "b": b,
        "votes": len(votes),
        "entries": len(per_entry),
        "voters": len({vote.voter for vote in votes}),
        **{f"chose_{choice}": count for choice, count in counts.items()},
        "share_b": share.json() if share else None,
        "win_rate_b": rate.json(),  # ties one half, over entries
        "sign_p": compare.sign_test(counts["b"], counts["a"]),
        "left": sum(vote.choice != "tie" and vote.choice == vote.left for vote in votes),
        "between_voters": _between(votes),
        "rewards": _rewards(a, b, votes, manifest) if manifest else {},
    }


def _between(votes: Sequence[Vote]) -> dict[str, Any]:
    """How often two voters who both decided chose alike, over all such pairs of votes."""
    by_entry: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_entry[vote.entry].append(vote)
    pairs = [
        (x.choice, y.choice)
        for found in by_entry.values()
        for k, x in enumerate(found)
        for y in found[k + 1 :]
        if x.voter != y.voter and "tie" not in (x.choice, y.choice)
    ]
    same = sum(x == y for x, y in pairs)
    return {"share": same / len(pairs) if pairs else None, "n": len(pairs)}


def _rewards(a: str, b: str, votes: Sequence[Vote], manifest: Mapping[str, Any]) -> dict[str, Any]:
    names = [system["name"] for system in manifest["systems"]]
    if a not in names or b not in names:
        return {}
    at = names.index(a), names.index(b)
    shots = {entry["id"]: (entry["shots"][at[0]], entry["shots"][at[1]]) for entry in manifest["entries"]}
    mine = [vote for vote in votes if vote.entry in shots]
    choices = [SIGN[vote.choice] for vote in mine]
    found = {}
    for reward in manifest["rewards"]:
        gaps = [_gap(shots[vote.entry], reward["name"]) for vote in mine]
        found[reward["name"]] = compare.agreement(choices, gaps)
    return found


def _gap(shots: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None], name: str) -> float | None:
    x, y = ((shot or {}).get("scores", {}).get(name) for shot in shots)
    return None if x is None or y is None else float(y) - float(x)


def _vote(row: Mapping[str, Any], where: str) -> Vote:
    if row.get("format") != FORMAT:
        raise ConfigError(f"{where} is not a vote. Give the JSONL files that a gallery exported.")
    if not isinstance(row.get("version"), int) or row["version"] > VERSION:
        raise ConfigError(f"{where} has version {row.get('version')!r}, and this diffalign reads up to {VERSION}.")
    told: dict[str, Any] = {name: row.get(name) for name in Vote.__annotations__}
    texts = [name for name in ("page", "entry", "prompt", "a", "b", "voter", "at") if not isinstance(told[name], str)]
    if texts or told["choice"] not in get_args(Choice) or told["left"] not in ("a", "b"):
        wrong = texts[0] if texts else "choice" if told["choice"] not in get_args(Choice) else "left"
        raise ConfigError(f"{where} has {wrong} = {told[wrong]!r}, which is not a vote's. See docs/gallery.md.")
    return Vote(**(told | {"blind": told["blind"] is True}))
