"""Pictures that are there already: search runs, votes and preference files as data to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.train import known
from diffalign.train.known import DataConfig, Stock
from tests.train import jobs
from tests.train.tiny_runs import CALL, files, pipeline, rows, run, settings

OTHERS = "evaluation.txt"


def picture(path: Path, shade: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade, 255 - shade, shade // 2)).save(path)
    return path.name


def search_run(folder: Path, *, count: int = 3, shift: int = 0) -> Path:
    """A run folder as `generate --top-k` writes it: brighter is better."""
    found = []
    for index, prompt in enumerate(("red cube", "blue ball")):
        for rank in range(count):
            shade = 200 - 60 * rank + shift + index
            name = f"images/{index:05d}_{rank}.png"
            picture(folder / name, shade)
            found.append({"index": index, "rank": rank, "prompt": prompt, "file": name, "reward": shade / 255})
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def data(**given: Any) -> list[known.Known]:
    return known.read(DataConfig(**given))


def test_a_search_run_gives_its_images_by_reward(tmp_path: Path) -> None:
    found = data(from_search=(str(search_run(tmp_path / "run")),))
    assert [each.case.prompt for each in found] == ["red cube", "blue ball"]
    assert [score * 255 for score in found[0].scores] == pytest.approx([200, 140, 80])
    assert found[0].pictures[0].open().getpixel((0, 0))[0] == 200


def test_plain_draws_lose_to_a_search(tmp_path: Path) -> None:
    winners = search_run(tmp_path / "tree", count=1)
    losers = search_run(tmp_path / "stock", count=1, shift=-70)
    found = data(from_search=(str(winners),), against=str(losers))
    assert [len(each.pictures) for each in found] == [2, 2]
    assert found[0].scores == pytest.approx((200 / 255, 130 / 255))
    (losers / "card.json").write_text('{"rewards": {"clip": 1}}')  # numbers of another reward say nothing here
    assert data(from_search=(str(winners),), against=str(losers))[0].scores[1] == pytest.approx(200 / 255 - 1)
    (losers / "card.json").unlink()
    unscored = [{k: v for k, v in row.items() if k != "reward"} for row in lines(losers / "results.jsonl")]
    (losers / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unscored))
    assert data(from_search=(str(winners),), against=str(losers))[0].scores == pytest.approx((200 / 255, 200 / 255 - 1))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_votes_and_preference_files_become_pairs(tmp_path: Path) -> None:
    for k in range(4):
        picture(tmp_path / f"{k}.png", 40 * k)
    vote = {
        "format": "diffalign-votes", "version": 1, "page": "p", "entry": "e", "prompt": "red cube", "a": "x", "b": "y",
        "a_path": "0.png", "b_path": "1.png", "choice": "b", "left": "a", "blind": True, "voter": "v",
        "at": "2026-01-01",
    }  # fmt: skip
    (tmp_path / "votes.jsonl").write_text(json.dumps(vote) + "\n")
    pair = {"prompt": "blue ball", "path1": "2.png", "path2": "3.png", "choice_dist": [9, 1], "confidence": 0.9}
    (tmp_path / "hpdv3.json").write_text(json.dumps([pair]))
    found = data(from_votes=(str(tmp_path / "votes.jsonl"),), pairs=(str(tmp_path / "hpdv3.json"),))
    assert [(each.case.prompt, each.pictures[0].content) for each in found] == [
        ("red cube", "1.png"),
        ("blue ball", "2.png"),
    ]


def test_a_missing_picture_is_told_with_its_place(tmp_path: Path) -> None:
    folder = search_run(tmp_path / "run")
    (folder / "images/00001_2.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 6 pictures .* missing, first 'images/00001_2.png'.*results.jsonl:6"):
        data(from_search=(str(folder),))


def test_pictures_that_are_all_the_same_say_nothing(tmp_path: Path) -> None:
    folder = search_run(tmp_path / "run")
    for rank in range(3):
        picture(folder / f"images/00001_{rank}.png", 7)
    with pytest.warns(UserWarning, match="1 of 2 entries"):
        assert [each.case.prompt for each in data(from_search=(str(folder),))] == ["red cube"]
    for rank in range(3):
        picture(folder / f"images/00000_{rank}.png", 7)
    with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(ConfigError, match="two different pictures"):
        data(from_search=(str(folder),))


@pytest.mark.parametrize(
    "bad", ['{"prompt": "x"}', '{"prompt": "x", "file": "../../etc/passwd", "reward": 1}', "no json"]
)
def test_a_run_that_is_none_is_refused(tmp_path: Path, bad: str) -> None:
    (tmp_path / "results.jsonl").write_text(bad + "\n")
    with pytest.raises(ConfigError, match="run folder"):
        data(from_search=(str(tmp_path),))


def test_every_step_has_the_best_and_other_pictures_by_its_number_alone(tmp_path: Path) -> None:
    stock = Stock(data(from_search=(str(search_run(tmp_path / "run", count=4)),)), seed=3)
    seen = set()
    for step in range(12):
        groups = stock.of(step, 2, 2)
        assert groups == stock.of(step, 2, 2)
        for group in groups:
            assert group[0][2] > group[1][2]
            seen.add((group[0][0].prompt, group[1][2]))
    assert len(seen) == 6  # three losers for each of two prompts
    assert len({case.seed for step in range(3) for group in stock.of(step, 2, 2) for case, _, _ in group}) == 12


def test_a_picture_becomes_the_latent_that_decodes_to_it(tmp_path: Path) -> None:
    from diffalign.train.opening import opened

    folder = search_run(tmp_path / "run")
    (tmp_path / OTHERS).write_text("green tree\ngrey boat\n")
    told = settings(tmp_path, **asked(tmp_path, folder, "sft"))
    with opened(pipeline(), told, model="tiny", call=CALL, seed=0, out=tmp_path / "o") as job:
        found = job.stock.of(0, 1, 1)[0]
        clean = known.latents(job, [found[0][0]], [found[0][1]])
        assert clean.shape[1:] == job.driver(job.prompts[:1]).start().shape[1:]
        wide = Image.new("RGB", (40, 20), (200, 55, 100))
        wide.save(tmp_path / "wide.png")
        fitted = known._fitted(torch.rand(3, 20, 40), 16, 16)
        assert fitted.shape == (3, 16, 16)


def asked(folder: Path, search: Path, objective: str, **own: Any) -> dict[str, Any]:
    size = 1 if objective == "sft" else 2
    return {
        "prompts": None,
        "data": {"from_search": [str(search)]},
        "objective": {objective: own},
        "group_size": size,
        "micro_batch": 2,
        "evaluate": {"prompts": str(folder / OTHERS)},
    }


@pytest.mark.parametrize(
    "objective", ["sft", "dpo", *[pytest.param(name, marks=pytest.mark.slow) for name in ("nft", "crd")]]
)
def test_what_a_search_found_is_learnt_and_the_loss_falls(tmp_path: Path, objective: str) -> None:
    folder = search_run(tmp_path / "run")
    (tmp_path / OTHERS).write_text("green tree\ngrey boat\n")
    told = asked(tmp_path, folder, objective, draws=3)
    run(tmp_path, out="out", steps=8, optim={"learning_rate": 1e-2}, **told)
    loss = [row["loss"] for row in rows(tmp_path / "out") if "loss" in row]
    assert len(loss) == 8
    if objective in ("sft", "dpo"):  # the loss of the others need not fall, as the old model follows
        assert loss[-1] < loss[0]
    assert files(tmp_path / "out")


def test_data_without_evaluation_prompts_or_with_shared_ones_is_refused(tmp_path: Path) -> None:
    folder = search_run(tmp_path / "run0")
    (tmp_path / OTHERS).write_text("Red  Cube\ngrey boat\n")
    told = asked(tmp_path, folder, "dpo")
    with pytest.raises(ConfigError, match="stand in the data too, such as 'Red  Cube'"):
        run(tmp_path, **told)
    with pytest.raises(ConfigError, match="learnt by heart"):
        run(tmp_path, **{**told, "evaluate": {"prompts": None}})


def test_data_is_refused_where_it_would_not_be_read(tmp_path: Path) -> None:
    folder = search_run(tmp_path / "run0")
    (tmp_path / OTHERS).write_text("green tree\ngrey boat\n")
    told = asked(tmp_path, folder, "dpo")
    with pytest.raises(ConfigError, match="draws its own images"):
        run(tmp_path, **{**told, "objective": "flow_grpo"})
    with pytest.raises(ConfigError, match="some prompts of the data have 3 pictures"):
        run(tmp_path, **{**told, "group_size": 4, "micro_batch": 4})
    with pytest.raises(ConfigError, match="bring their prompts"):
        settings(tmp_path, **{**told, "prompts": "x.txt"})


def test_a_limit_holds_and_prompts_with_one_picture_are_left_out_beside_others(tmp_path: Path) -> None:
    folder = search_run(tmp_path / "run")
    assert len(data(from_search=(str(folder),), limit=1)) == 1
    alone = [row for row in lines(folder / "results.jsonl") if row["index"] == 0 or row["rank"] == 0]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    with pytest.warns(UserWarning, match="1 prompts of the data have one picture"):
        assert [each.case.prompt for each in data(from_search=(str(folder),))] == ["red cube"]
    with pytest.raises(ConfigError, match=r"use data\.limit"):
        settings(tmp_path, prompts=None, data={"from_search": ["x"]}, limit=3)


def test_pictures_are_no_data_for_a_model_of_films(tmp_path: Path) -> None:
    entry = data(from_search=(str(search_run(tmp_path / "run")),))[0]
    with jobs.job("wan21", "sft") as (job, _), pytest.raises(ConfigError, match="draws films of"):
        known.latents(job, [entry.case], [entry.pictures[0]])


@pytest.mark.parametrize("family", ["sd15_ddim", "flux"])
def test_pictures_become_latents_that_decode_to_them(family: str, tmp_path: Path) -> None:
    entry = data(from_search=(str(search_run(tmp_path / "run")),))[0]
    with jobs.job(family, "sft") as (job, _):
        found = known.latents(job, [entry.case], [entry.pictures[0]])
        assert found.shape == job.driver([entry.case]).start().shape
