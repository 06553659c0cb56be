"""EditReward-Bench end to end, on a small one made here: from the file through `editscore` to the accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.data.accuracy import measure
from diffalign.data.judged import judge
from diffalign.data.preferences import read_comparisons
from diffalign.judges.asking import Question
from diffalign.rewards.editscore import EditScore
from diffalign.rules.edit_scores import pair_right
from diffalign.scoring import score
from tests.rewards.scripted import Scripted, grey, level


def lights(question: Question) -> str:
    """The brighter the edit, the better it followed; all else is the same."""
    followed = round(25 * level(question.images[-1])) if len(question.images) == 2 else 20
    return json.dumps({"reasoning": "", "score": [followed, 20]})


def bench(folder: Path) -> Path:
    """A bench of two kinds of edits: three pairs of one, one of the other; the brighter edit is the better one."""
    pairs = [("tone", 0.9, 0.2), ("tone", 0.8, 0.1), ("tone", 0.5, 0.5), ("motion", 0.2, 0.9)]
    rows = []
    for number, (kind, better, worse) in enumerate(pairs):
        names = [f"{number}_{place}.png" for place in range(3)]
        for name, shade in zip(names, (0.4, better, worse), strict=True):
            grey(shade, (16, 16)).save(folder / name)
        rows.append({"key": str(number), "instruction": f"brighten {number}", "input_image": names[0]})
        rows[-1] |= {"output_images": names[1:], "task_type": kind, "dimension": "prompt_following"}
    file = folder / "bench.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_a_bench_is_judged_strictly_and_over_kinds_of_edits(tmp_path: Path) -> None:
    found = read_comparisons(bench(tmp_path))
    reward = EditScore(Scripted(lights))
    verdicts = judge(found, [reward], score)
    told = measure("editreward", [verdict.judged("editscore") for verdict in verdicts])
    assert told.accuracy is not None
    assert told.by_kind == {"motion": 0.0, "tone": pytest.approx(2 / 3)}  # the tie is wrong
    assert told.accuracy.mean == pytest.approx(1 / 3)  # of kinds, not of pairs
    assert told.score_ties == 1
    turned = [verdict.judged("editscore") for verdict in verdicts]
    swapped = measure(
        "editreward",
        [type(one)(ranks=one.ranks[::-1], scores=one.scores, group=one.group, kind=one.kind) for one in turned],
    )
    assert swapped.by_kind == {"motion": 1.0, "tone": 0.0}  # wins turned into losses, the tie is wrong both ways


def test_the_aspect_of_a_bench_is_judged_by_its_own_part(tmp_path: Path) -> None:
    def careful(question: Question) -> str:
        return (
            json.dumps([25, round(25 * (1 - level(question.images[1])))]) if len(question.images) == 2 else "[20, 20]"
        )

    file = bench(tmp_path)
    rows = [json.loads(line) | {"dimension": "consistency"} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    verdicts = judge(read_comparisons(file), [EditScore(Scripted(careful))], score)
    told = measure("editreward", [verdict.judged("editscore") for verdict in verdicts])
    assert told.by_kind == {"motion": 1.0, "tone": 0.0}


def test_the_accuracy_is_the_law_of_a_pair_averaged_over_kinds(tmp_path: Path) -> None:
    verdicts = judge(read_comparisons(bench(tmp_path)), [EditScore(Scripted(lights))], score)
    judged = [verdict.judged("editscore") for verdict in verdicts]
    right = {kind: [pair_right(*one.scores) for one in judged if one.kind == kind] for kind in ("tone", "motion")}
    told = measure("editreward", judged)
    assert told.accuracy is not None
    assert told.accuracy.mean == pytest.approx(sum(sum(each) / len(each) for each in right.values()) / len(right))
