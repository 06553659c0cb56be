"""How each set of preferences is read; preferences.py says which is which.

Yuval Kirstain et al.: "Pick-a-Pic", 2023 (2305.01569). Xiaoshi Wu et al.: "Human Preference Score v2", 2023
(2306.09341). Jiazheng Xu et al.: "ImageReward", 2023 (2304.05977). Yuhang Ma et al.: "HPSv3", 2025 (2508.03789).
"EditScore", 2025 (2509.23909), whose pairs are called EditReward-Bench.

Where we differ: an even vote of HPDv3 is a tie, though its file names a preferred picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from diffalign.cases import Case
from diffalign.data.kinds import kind_of
from diffalign.data.pictures import Picture
from diffalign.data.preferences import Comparison, Reader, dense, prompt_key
from diffalign.data.row import Row
from diffalign.data.tables import read_rows

NO = (False, 0, "False", "false", "0")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format, the columns that give it away, and the protocol that its authors report."""

    read: Reader
    columns: tuple[tuple[str, ...], ...]
    protocol: str
    fits: Callable[[Row], bool] = lambda row: True


def _compared(row: Row, prompt: str, pictures: Sequence[Picture], ranks: Sequence[float], **more: Any) -> Comparison:
    """A comparison of a row whose lists have been checked."""
    metadata = {"kind": kind} if (kind := more.pop("kind", "")) else {}
    more.setdefault("group", prompt_key(prompt))
    return Comparison(case=Case(prompt=prompt, metadata=metadata), pictures=tuple(pictures), ranks=dense(ranks), **more)


def _pictures(row: Row, name: str, root: Path | None) -> list[Picture]:
    return [Picture.of(row, name, value if value is not None else "", root) for value in row.several(name)]


def pickapic(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    labels = ("label_0", "label_1")
    columns = ("caption", "jpg_0", "jpg_1", *labels, "has_label", "num_example_per_prompt")
    for row in read_rows(path, columns):
        if row.values.get("has_label", True) in NO:
            continue
        likes = [row.number(name) for name in labels]
        if sorted(likes) not in ([0.0, 1.0], [0.5, 0.5]):
            raise row.error(f"has the labels {likes[0]:g} and {likes[1]:g}; they are 0 and 1, or one half each.")
        count = row.number("num_example_per_prompt") if "num_example_per_prompt" in row else 1.0
        pictures = [Picture.of(row, name, root=root) for name in ("jpg_0", "jpg_1")]
        yield _compared(row, row.text("caption"), pictures, [-like for like in likes], weight=1 / max(count, 1.0))


def hpdv2(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    for row in read_rows(path):
        pictures = _pictures(row, "image_path", root)
        ranks = row.numbers("rank") if "rank" in row else _mean_ranks(row)
        row.same_length("'image_path' and 'rank'", pictures, ranks)
        yield _compared(row, row.text("prompt"), pictures, ranks)


def _mean_ranks(row: Row) -> list[float]:
    """What the annotators gave each picture on average."""
    name = "raw_annotations" if "raw_annotations" in row else "raw_annotation"
    each = [value.get("rank") if isinstance(value, dict) else None for value in row.several(name)]
    given = [[row.as_number(rank, name) for rank in ranks] for ranks in each if isinstance(ranks, list)]
    if not given or len(given) != len(each) or len({len(ranks) for ranks in given}) > 1:
        raise row.error(f"has no 'rank', and no rank of every picture under '{name}'.")
    return [fmean(ranks) for ranks in zip(*given, strict=True)]


def hpdv2_pairs(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    for row in read_rows(path):
        pictures, likes = _pictures(row, "file_path", root), row.numbers("human_preference")
        row.same_length("'file_path' and 'human_preference'", pictures, likes)
        yield _compared(row, row.text("prompt"), pictures, [-like for like in likes])


def hpdv3(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    for row in read_rows(path):
        votes = row.numbers("choice_dist") if "choice_dist" in row else []
        if votes and (len(votes) != 2 or min(votes) < 0 or not sum(votes)):
            raise row.error(f"has the votes {votes}; 'choice_dist' counts those for either picture.")
        if votes and votes[0] < votes[1]:
            raise row.error(f"has the votes {votes}, which contradict 'path1': it is the preferred picture.")
        share = max(votes) / sum(votes) if votes else None
        told = row.number("confidence") if "confidence" in row else share
        ranks = (1, 1) if votes and votes[0] == votes[1] else (1, 2)
        pictures = [Picture.of(row, name, root=root) for name in ("path1", "path2")]
        yield _compared(row, row.text("prompt"), pictures, ranks, confidence=told)


def imagereward(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    """Pictures wait for the others of their prompt: until as many are there as the row says, or the file ends."""
    waiting: dict[str, list[tuple[Row, Picture, float]]] = {}
    for row in read_rows(path):
        if "generations" in row:
            pictures, ranks = _pictures(row, "generations", root), row.numbers("ranking")
            row.same_length("'generations' and 'ranking'", pictures, ranks)
            yield _compared(row, row.text("prompt"), pictures, ranks)
            continue
        number = row.text_or("prompt_id") or row.text("prompt_id")
        column = "image" if "image" in row else "image_path"
        group = waiting.setdefault(number, [])
        if group and group[0][0].text("prompt") != row.text("prompt"):
            raise row.error(f"has another prompt than {group[0][0].where}, but the same prompt_id '{number}'.")
        group.append((row, Picture.of(row, column, root=root), row.number("rank")))
        whole = row.number("image_amount_in_total") if "image_amount_in_total" in row else None
        if len(group) == whole:
            yield from _ranked(waiting.pop(number))
    for group in waiting.values():
        yield from _ranked(group)


def _ranked(group: list[tuple[Row, Picture, float]]) -> Iterator[Comparison]:
    """One comparison, or none where a prompt has one picture only."""
    row, prompt = group[0][0], group[0][0].text("prompt")
    if len(group) > 1:
        kind = kind_of(row.text_or("classification"))
        yield _compared(row, prompt, [p for _, p, _ in group], [rank for *_, rank in group], kind=kind)


def imagereward_pairs(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    for row in read_rows(path):
        pictures = [Picture.of(row, name, root=root) for name in ("img_better", "img_worse")]
        yield _compared(row, row.text("prompt"), pictures, (1, 2), kind=kind_of(row.text_or("classification")))


def editreward(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    for row in read_rows(path):
        pictures, instruction = _pictures(row, "output_images", root), row.text("instruction")
        row.same_length("'output_images'", pictures)
        if len(pictures) != 2:
            raise row.error(f"has {len(pictures)} edits, but a row is a pair, the better one first.")
        source = Picture.of(row, "input_image", root=root)
        yield _compared(
            row,
            instruction,
            pictures,
            (1, 2),
            source=source,
            kind=kind_of(row.text_or("task_type")),
            aspect=row.text_or("dimension"),
            group=prompt_key(instruction, source.key),
        )


def votes(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    latest: dict[tuple[str, ...], tuple[str, Row]] = {}
    for row in read_rows(path):
        if row.values.get("format") != "diffalign-votes":
            raise row.error("is not a vote. Give the JSONL files that a gallery exported.")
        at = row.text("at")
        who = tuple(row.text_or(name) for name in ("voter", "page", "entry", "a", "b"))
        if who not in latest or latest[who][0] <= at:
            latest[who] = at, row
    for _, row in latest.values():
        choice = row.text("choice")
        if choice not in ("a", "b", "tie"):
            raise row.error(f"has the choice {choice[:40]!r}; it is a, b or tie.")
        if row.values.get("blind") is True and "a_path" in row and "b_path" in row:
            pictures = [Picture.of(row, name, root=root) for name in ("a_path", "b_path")]
            ranks = {"a": (1, 2), "b": (2, 1), "tie": (1, 1)}[choice]
            yield _compared(row, row.text("prompt"), pictures, ranks)


def plain(path: str | Path, root: Path | None) -> Iterator[Comparison]:
    for row in read_rows(path):
        pictures, ranks = _pictures(row, "images", root), row.numbers("ranks")
        row.same_length("'images' and 'ranks'", pictures, ranks)
        more: dict[str, Any] = {"kind": row.text_or("kind"), "aspect": row.text_or("aspect")}
        more |= {name: row.number(name) for name in ("weight", "confidence") if name in row}
        more |= {"source": Picture.of(row, "source", root=root)} if "source" in row else {}
        more |= {"group": row.text_or("group")} if row.text_or("group") else {}
        yield _compared(row, row.text("prompt"), pictures, ranks, **more)


def _is_list(name: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.values.get(name), list)


FORMATS = {  # the first that fits is taken
    "votes": Format(read=votes, columns=(("choice", "a_path", "b_path"),), protocol="half"),
    "pickapic": Format(read=pickapic, columns=(("caption", "label_0", "label_1"),), protocol="pickapic"),
    "hpdv3": Format(read=hpdv3, columns=(("prompt", "path1", "path2"),), protocol="half"),
    "hpdv2_pairs": Format(read=hpdv2_pairs, columns=(("prompt", "file_path", "human_preference"),), protocol="half"),
    "hpdv2": Format(
        read=hpdv2,
        columns=(("prompt", "image_path", "rank"), ("prompt", "image_path", "raw_annotations")),
        protocol="hpdv2",
        fits=_is_list("image_path"),
    ),
    "imagereward_pairs": Format(read=imagereward_pairs, columns=(("img_better", "img_worse"),), protocol="half"),
    "imagereward": Format(
        read=imagereward, columns=(("prompt_id", "rank"), ("generations", "ranking")), protocol="imagereward"
    ),
    "editreward": Format(
        read=editreward, columns=(("instruction", "input_image", "output_images"),), protocol="editreward"
    ),
    "plain": Format(read=plain, columns=(("prompt", "images", "ranks"),), protocol="half"),
}
