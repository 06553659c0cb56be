"""`bench search` compares at equal NFE, goes on where it stopped, and marks what does not beat best-of-N."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.bench import search
from diffalign.bench.pace import kept_bytes
from diffalign.cli import main
from diffalign.errors import ConfigError
from tests.cli.conftest import SMALL, here, tiny  # noqa: F401

ASK = [
    "bench",
    "search",
    "--prompts",
    "3",
    "--batch",
    "2",
    "--budgets",
    "1,3",
    "-r",
    "brightness",
    "--json",
    "out.json",
]
ONLY = ["--only", "stock", "--only", "best_of_n", "--only", "tree", "--only", "search"]


def test_every_cell_is_filled_and_no_method_spends_more_than_best_of_n(tiny: str, here: Path):  # noqa: F811
    assert main([*ASK, *ONLY, "-m", tiny, *SMALL]) == 0
    found = json.loads((here / "out.json").read_text())
    cells = {(row["method"], row["times"]): row for row in found["rows"]}
    assert set(cells) == {("stock", 1), *((m, t) for m in ("best_of_n", "tree", "search") for t in (1, 3))}
    for (_, times), row in cells.items():
        assert row["nfe"] <= times * cells["stock", 1]["nfe"]
        assert row["prompts"] == 3
        assert {"method", "nfe", "seconds", "proxy", "truth", "diversity", "beats_best_of_n"} <= set(row)
        assert row["truth"]["lo"] <= row["truth"]["mean"] <= row["truth"]["hi"]
    assert cells["tree", 3]["beats_best_of_n"] in (True, False)
    assert found["card"]["prompts"]
    assert Image.open(here / "out/bench_search/plot.png").size[0] > 800
    assert "| 3x | tree |" in (here / "out/bench_search/table.md").read_text()


def test_a_stopped_grid_goes_on_where_it_stopped(tiny: str, here: Path):  # noqa: F811
    ask = [*ASK, "--only", "stock", "--only", "best_of_n", "-m", tiny, *SMALL]
    assert main(ask) == 0
    rows, whole = here / "out/bench_search/rows.jsonl", json.loads((here / "out.json").read_text())
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:5]) + lines[5][:20])  # killed in the middle of a line
    assert main(ask) == 0
    again = json.loads((here / "out.json").read_text())
    for before, after in zip(whole["rows"], again["rows"], strict=True):
        assert before["proxy"] == after["proxy"]
        assert before["prompts"] == after["prompts"] == 3


def test_a_finished_grid_runs_nothing_again(tiny: str, here: Path):  # noqa: F811
    ask = [*ASK, "--only", "stock", "-m", tiny, *SMALL]
    assert main(ask) == 0
    rows = (here / "out/bench_search/rows.jsonl").read_bytes()
    assert main(ask) == 0
    assert (here / "out/bench_search/rows.jsonl").read_bytes() == rows


def test_results_of_another_seed_are_not_mixed_in(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    ask = [*ASK, "--only", "stock", "-m", tiny, *SMALL]
    assert main(ask) == 0
    assert main([*ask, "--seed", "1"]) == 2
    assert "seeds" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [["--budgets", "0,2"], ["--budgets", "a"], ["--prompts", "0"], ["--only", "tre"]])
def test_a_grid_that_makes_no_sense_is_refused(bad: list[str], tiny: str, here: Path):  # noqa: F811
    assert main([*ASK, *bad, "-m", tiny, *SMALL]) == 2


def rows(method: str, truth: list[float]) -> list[dict[str, Any]]:
    shared = {"times": 4, "nfe": 80.0, "seconds": 1.0, "diversity": None}
    return [{"method": method, "index": k, "proxy": t, "truth": t, **shared} for k, t in enumerate(truth)]


def test_the_gap_to_best_of_n_is_paired_over_prompts():
    base = [0.0, 1.0] * 20
    better = [1.0 if k % 5 == 0 else value for k, value in enumerate(base)]
    found = {row["method"]: row for row in search.summary([*rows("best_of_n", base), *rows("tree", better)])}
    assert found["tree"]["over_best_of_n"]["mean"] == pytest.approx(0.1)
    assert found["tree"]["over_best_of_n"]["lo"] > 0  # unpaired, forty prompts could not tell
    assert found["tree"]["beats_best_of_n"] is True
    assert found["best_of_n"]["beats_best_of_n"] is None


def test_a_method_that_only_ties_is_marked_as_not_beating():
    base = [0.0, 1.0] * 20
    found = {row["method"]: row for row in search.summary([*rows("best_of_n", base), *rows("tree", base)])}
    assert found["tree"]["beats_best_of_n"] is False
    assert "not beaten" in search.table(list(found.values()))


def test_spread_is_the_mean_distance_of_pairs():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    assert search.spread(images) == pytest.approx(2 / 3)
    assert search.spread(images[:1]) is None


def test_a_row_cut_short_is_left_out(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"method": "a", "times": 1, "index": 0}\n{"method": "a", "ti')
    assert len(search.read_rows(tmp_path)) == 1


def test_a_budget_list_is_sorted_and_without_repeats():
    from diffalign.cli.bench_search import multiples

    assert multiples("16,1,4,4", "budgets") == [1, 4, 16]
    with pytest.raises(ConfigError, match="whole numbers"):
        multiples("1;2", "budgets")


@pytest.mark.slow
def test_bench_pace_gives_its_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "pace", "--prompts", "2", "--repeats", "1", "--json", "pace.json"]) == 0
    found = json.loads((tmp_path / "pace.json").read_text())
    assert set(found["lockstep"]) == {"overhead-bound", "shapes-sd3"}
    assert found["reno_time_ratio"] > 0
    assert 0.5 < found["reno_memory_ratio"] < 2


def test_memory_kept_for_a_backward_pass_is_counted_once():
    x = torch.ones(100, requires_grad=True)
    assert kept_bytes(lambda: (x.exp() * 2).sum()) == 400
    assert kept_bytes(lambda: (x * x).sum()) == 400
