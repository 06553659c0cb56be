"""Votes: merging files, what they say, and that random answers say nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from diffalign.cli import main
from diffalign.errors import ConfigError
from diffalign.gallery import votes
from tests.gallery.test_pages import side, written


def line(entry: str = "e", choice: str = "b", voter: str = "ann", at: str = "2026-01-01T00:00:00Z", **more: Any) -> str:
    vote = {
        "format": "diffalign-votes",
        "version": 1,
        "page": "p",
        "entry": entry,
        "prompt": "x",
        "a": "stock",
        "b": "tree",
        "a_path": "media/a.png",
        "b_path": "media/b.png",
        "choice": choice,
        "left": "a",
        "blind": True,
        "voter": voter,
        "at": at,
    }
    return json.dumps(vote | more)


def read(tmp_path: Path, *lines: str) -> list[votes.Vote]:
    (tmp_path / "votes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return votes.read(tmp_path / "votes.jsonl")


def test_a_later_vote_of_the_same_voter_replaces_the_earlier(tmp_path: Path):
    found = read(
        tmp_path, line(choice="a", at="2026-01-02T00:00:00Z"), line(choice="b"), line(voter="ben", choice="tie")
    )
    merged = votes.merged([found, found])
    assert [(vote.voter, vote.choice) for vote in merged] == [("ann", "a"), ("ben", "tie")]
    assert votes.merged([merged]) == merged
    assert read(tmp_path, *(json.dumps(vote.json()) for vote in merged)) == merged


def test_counts_shares_and_chance(tmp_path: Path):
    lines = [line(f"e{k}", "b" if k < 8 else "a") for k in range(10)] + [line("tied", "tie")]
    lines.append(line("seen", "a", blind=False))  # counts for nothing
    (found,) = votes.results(read(tmp_path, *lines))
    assert (found["chose_a"], found["chose_b"], found["chose_tie"]) == (2, 8, 1)
    assert found["share_b"]["mean"] == 0.8
    assert found["sign_p"] == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert found["win_rate_b"]["mean"] == pytest.approx(8.5 / 11)
    assert found["left"] == 2
    wilson = stats.binomtest(8, 10).proportion_ci(0.95, "wilson")
    assert (found["share_b"]["lo"], found["share_b"]["hi"]) == pytest.approx((wilson.low, wilson.high))


def test_pages_are_told_apart_and_line_ends_do_not_matter(tmp_path: Path):
    lines = [line("1"), line("2", "a", page="q"), line("3", prompt="a\u2028b")]
    (tmp_path / "v.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).replace("\\u2028", "\u2028").encode())
    found = votes.results(votes.read(tmp_path / "v.jsonl"))
    assert [(row["page"], row["chose_a"], row["chose_b"]) for row in found] == [("p", 0, 2), ("q", 1, 0)]
    about = {"id": "q", "systems": [], "entries": [], "rewards": []}
    (only,) = votes.results(votes.read(tmp_path / "v.jsonl"), about)
    assert only["votes"] == 1


def test_random_answers_favour_no_system(tmp_path: Path):
    draw, rejected = random.Random(0), 0
    for _ in range(200):
        lines = [line(f"e{k}", draw.choice(["a", "b", "tie"])) for k in range(60)]
        (found,) = votes.results(read(tmp_path, *lines))
        rejected += found["sign_p"] < 0.05
    assert rejected <= 18  # at most 5 % of the time, and the exact test is conservative: 200 x .05 + 3 standard errors


def test_voters_are_compared_with_each_other(tmp_path: Path):
    lines = [line("1", "a"), line("1", "a", "ben"), line("2", "b"), line("2", "a", "ben"), line("2", "tie", "cem")]
    (found,) = votes.results(read(tmp_path, *lines))
    assert found["between_voters"] == {"share": 0.5, "n": 2}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "not JSON"),
        ("{}", "not a vote"),
        (line(version=2), "version 2"),
        (line(choice="c"), "choice = 'c'"),
        (line(left=None), "left = None"),
        (line(voter=3), "voter = 3"),
    ],
)
def test_a_line_that_is_no_vote_is_named(tmp_path: Path, bad: str, said: str):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, line(), bad)


def test_several_peoples_files_become_one_and_are_held_against_the_rewards(tmp_path: Path, capsys):
    prompts = ["x", "y", "z"]
    made = written(tmp_path / "page", side("stock", prompts, [0, 0, 0]), side("tree", prompts, [1.0, 1.0, -1.0]))
    ids = [entry["id"] for entry in made["entries"]]
    files = []
    for voter, choices in (("ann", "bba"), ("ben", "bbb")):
        file = tmp_path / f"{voter}.jsonl"
        rows = [line(i, c, voter, page=made["id"]) for i, c in zip(ids, choices, strict=True)]
        file.write_text("\n".join(rows), encoding="utf-8")
        files.append(str(file))
    out, told = tmp_path / "all.jsonl", tmp_path / "told.json"
    words = ["gallery", "votes", *files, "--page", str(tmp_path / "page"), "--out", str(out), "--json", str(told)]
    assert main(words) == 0
    (found,) = json.loads(told.read_text())["results"]
    assert len(votes.read(out)) == 6
    assert found["rewards"]["clip"]["mean"] == pytest.approx(5 / 6)
    assert "5 of 6 decided" in capsys.readouterr().out
    assert main(["gallery", "votes", *files, "--page", str(out)]) == 2
    assert main(["gallery", "votes"]) == 2
