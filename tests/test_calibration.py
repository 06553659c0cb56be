from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffalign import shaping
from diffalign.calibration import LEVELS, Table, describe, key_of, measure, read_tables, table_of, write_tables
from diffalign.cases import Case
from diffalign.cli.score_calibrate import add
from diffalign.cli.score_entry import Entry
from diffalign.cli.score_pass import Column
from diffalign.errors import ConfigError, InvalidReward
from diffalign.reward_kinds import FunctionReward, WeightedReward
from diffalign.scoring import Score, make_reward

BASE = {"model": "tiny", "sampler": {"steps": 20, "guidance": 4.5}}


class Light:
    modality, differentiable, range = "image", True, None

    def __init__(self, name: str = "light", version: str | None = "1", **options: Any) -> None:
        self.name, self.version, self.options = name, version, options

    def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
        return media.mean((1, 2, 3))


def table(values: dict[str, list[float]], reward: Light | None = None, base: dict[str, Any] = BASE) -> Table:
    cases = [Case(prompt=prompt) for prompt, row in values.items() for _ in row]
    total = torch.tensor([v for row in values.values() for v in row])
    return measure(reward or Light(), base, cases, Score(total))


numbers = st.floats(-1e4, 1e4, width=32)
tables_of = st.dictionaries(st.text(max_size=5), st.lists(numbers, min_size=1, max_size=6), min_size=1, max_size=4)


def test_a_table_holds_each_prompts_references_in_order_and_counts_the_invalid() -> None:
    found = table({"a": [0.5, math.nan, 0.25], "b": [2.0], "c": [math.nan]})
    assert found.prompts == {"a": (0.25, 0.5), "b": (2.0,), "c": ()}
    assert found.invalid == {"a": 1, "c": 1}
    assert (found.count, found.mean) == (3, pytest.approx(2.75 / 3))
    assert found.std0 == pytest.approx(pstdev([0.25, 0.5, 2]))
    assert found.references("a").tolist() == [0.25, 0.5]


def test_equal_references_have_no_deviation_at_all() -> None:
    assert table({"a": [0.1] * 7}).std0 == 0


def test_an_unseen_prompt_gets_the_pool_nothing_or_an_error() -> None:
    found = table({"a": [3.0, 1.0], "b": [2.0], "c": [math.nan]})
    for prompt in ("z", "c"):
        assert found.references(prompt).tolist() == [1, 2, 3]
        assert len(found.references(prompt, "invalid")) == 0
        with pytest.raises(ConfigError, match=f"no references for the prompt '{prompt}'.*--calibrate"):
            found.references(prompt, "error")
    rows = found.rows(["b", "z"])
    assert torch.equal(rows.nan_to_num(-1), torch.tensor([[2.0, -1, -1], [1, 2, 3]], dtype=torch.float64))
    assert found.rows([]).shape == (0, 0)


@given(st.integers(0, 99), st.integers(LEVELS + 1, 700))
def test_the_pooled_values_give_nearly_the_cdf_of_all(seed: int, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    found = table({"a": values.tolist()})
    assert len(found.pooled) == LEVELS
    ends = [shaping.calibrate_cdf(values, refs, smoothing=False) for refs in (found.pooled, values)]
    assert (ends[0] - ends[1]).abs().max() <= 1 / LEVELS


@given(tables_of)
def test_a_table_comes_back_from_its_file_as_it_was(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    path = tmp_path_factory.mktemp("tables") / "t.json"
    written = [table(values), table(values, Light("other", version="2", size=[1, 2]))]
    write_tables(path, written)
    found = read_tables(path)
    assert found == written
    assert [t.hash for t in found] == [t.hash for t in written]
    assert found[0].mean == pytest.approx(fmean(found[0].values.tolist()))


def test_new_prompts_join_the_file_and_a_prompt_measured_again_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_tables(path, [table({"a": [1.0, math.nan], "b": [2.0]})])
    write_tables(path, [table({"a": [5.0], "c": [3.0, math.nan]}), table({"a": [7.0]}, Light("dark"))])
    first, second = read_tables(path)
    assert first.prompts == {"a": (5.0,), "b": (2.0,), "c": (3.0,)}
    assert first.invalid == {"c": 1}
    assert second.prompts == {"a": (7.0,)}


@pytest.mark.parametrize(
    ("reward", "base", "field"),
    [
        (Light(version="2"), BASE, r"reward\.version is \"1\" there and \"2\" here"),
        (Light(size=3), BASE, r"reward\.options\.size is null there and 3 here"),
        (Light(), {**BASE, "sampler": {"steps": 30, "guidance": 4.5}}, r"base\.sampler\.steps is 20 there and 30 here"),
        (Light("another"), {**BASE, "model": "big"}, r"base\.model is \"tiny\" there"),
    ],
)
def test_what_is_not_comparable_is_refused_by_the_name_of_the_field(
    tmp_path: Path, reward: Light, base: dict[str, Any], field: str
) -> None:
    write_tables(tmp_path / "t.json", [table({"a": [1.0]})])
    before = (tmp_path / "t.json").read_bytes()
    with pytest.raises(ConfigError, match=field):
        write_tables(tmp_path / "t.json", [table({"b": [1.0]}, reward, base)])
    assert (tmp_path / "t.json").read_bytes() == before


@pytest.mark.parametrize(("old", "new"), [("0.25", "0.26"), ('"tiny"', '"huge"'), ('"a"', '"b"'), ("1.25", "1.5")])
def test_an_edited_file_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = write_tables(tmp_path / "t.json", [table({"a": [0.25, 2.25]})])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=r"edited or damaged.*hash.*diffalign score RUN"):
        read_tables(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', '{"schema": 1, "tables": [{}]}', "\x00", "3"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ConfigError, match="edited or damaged"):
        read_tables(tmp_path / "t.json")


def test_a_missing_file_or_another_schema_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no table of references.*diffalign score RUN .*--calibrate"):
        read_tables(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps({"schema": 9, "tables": []}))
    with pytest.raises(ConfigError, match="schema 9"):
        read_tables(tmp_path / "t.json")


def test_references_that_are_all_invalid_or_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidReward, match="all 2 reference images"):
        table({"a": [math.nan, math.nan]})
    with pytest.raises(ConfigError, match="2 scores for 1 cases"):
        measure(Light(), BASE, [Case(prompt="a")], Score(torch.zeros(2)))


def test_a_table_is_found_under_whatever_name_its_reward_has() -> None:
    tables = [table({"a": [1.0]}, Light(size=3)), table({"a": [2.0]}, Light("big", size=5))]
    assert table_of(Light("big", size=5), tables, "t.json") is tables[1]
    assert table_of(Light("alias", size=3), tables, "t.json") is tables[0]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (Light(version="2", size=3), r"reward\.version is \"1\" there and \"2\" here"),
        (Light(size=4), r"reward\.options\.size is 3 there and 4 here"),
        (Light("absent", version="2"), r"no references of reward 'absent' \(it has: light\)"),
    ],
)
def test_a_reward_without_its_table_gets_the_command_that_makes_it(reward: Light, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as e:
        table_of(reward, [table({"a": [1.0]}, Light(size=3))], "t.json")
    assert f"diffalign score RUN --reward {reward.name} --calibrate t.json" in str(e.value)


def test_a_reward_made_of_others_is_described_by_its_parts() -> None:
    both = [
        WeightedReward([Light("a"), Light("b", version=v)], [1.0, w]) for v, w in (("1", 2.0), ("2", 2.0), ("1", 3.0))
    ]
    described = [json.dumps(describe(reward)) for reward in both]
    assert len(set(described)) == 3
    assert describe(both[0])["parts"][1]["version"] == "1"


def test_a_base_is_kept_as_plain_values() -> None:
    found = table({"a": [1.0]}, base={"model": Path("m"), "call": {"size": (64, 64), "eta": math.inf}})
    assert found.base == {"model": "m", "call": {"size": [64, 64], "eta": "inf"}}


COMPOSITES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("hybrid", {"rule": Light(), "model": Light("dark")}, {"confidence": 0.5}),
    ("masked", {"inner": Light(), "monitor": Light("dark"), "target": 1.0}, {"high": 3.0}),
    ("masked", {"inner": Light(), "monitor": Light("dark"), "target": 1.0}, {"monitor": Light("dark", "2")}),
    ("partial", {"terms": {"a": Light()}}, {"bounds": {"a": (0.0, 2.0)}}),
    ("partial", {"terms": {"a": Light(), "b": Light("dark")}, "outcome": "a", "anneal": 5}, {"step": 2}),
    ("router", {"routes": {"a": Light()}}, {"by": "sort"}),
    ("router", {"routes": {"a": Light()}}, {"routes": {"b": Light()}}),
    ("relevance", {"similarity": Light()}, {"patch": 8}),
    ("mixture", {"rewards": Light(), "stages": ["mean"]}, {"stages": [{"clip": {"low": 0.0}}, "mean"]}),
    ("mixture", {"rewards": [Light(), Light("dark")], "stages": ["mean"]}, {"rewards": [Light(), (Light("dark"), 2)]}),
]


@pytest.mark.parametrize(("name", "told", "other"), COMPOSITES)
def test_rewards_of_rewards_built_in_python_are_told_apart_by_options_and_parts(
    name: str, told: dict[str, Any], other: dict[str, Any]
) -> None:
    kind = type(make_reward({name: told}))
    made, again, another = kind(**told), kind(**told), kind(**{**told, **other})
    found = measure(made, BASE, [Case(prompt="a")], Score(torch.zeros(1)))
    assert table_of(again, [found], "t.json") is found
    with pytest.raises(ConfigError, match="measured with another"):
        table_of(another, [found], "t.json")


def test_the_step_of_a_schedule_is_told_as_it_is_now() -> None:
    made: Any = make_reward({"partial": {"terms": {"a": Light(), "b": Light("dark")}, "outcome": "a", "anneal": 5}})
    before = describe(made)
    made.step = 3
    assert describe(made) != before


def test_a_table_of_a_mixture_knows_the_tables_it_was_made_with(tmp_path: Path) -> None:
    described = []
    for value in (1.0, 2.0):
        path = write_tables(tmp_path / "t.json", [table({"a": [value, 3.0]})])  # the same file, measured again
        described.append(describe(make_reward({"mixture": {"rewards": Light(), "table": str(path)}})))
    assert described[0] != described[1]


def test_a_reward_without_an_identity_gets_no_references_and_is_told_how_to_get_one() -> None:
    def closure(media: Tensor, cases: Sequence[Case]) -> Tensor:
        return media.mean((1, 2, 3))

    inside = WeightedReward([Light(), FunctionReward(closure, {})], [1, 1])
    silent = Light("silent")
    del silent.options
    for reward, said in ((FunctionReward(closure, {}), "closure"), (inside, "closure"), (silent, "silent")):
        with pytest.raises(ConfigError, match=rf'@register_reward\("{said}", version="1"\)'):
            measure(reward, BASE, [Case(prompt="a")], Score(torch.zeros(1)))
        with pytest.raises(ConfigError, match=f"'{said}' has .* could not be told from those of another"):
            table_of(reward, [], "t.json")


def test_references_are_kept_apart_by_what_a_reward_reads_beside_the_prompt_and_by_nothing_else() -> None:
    pictures = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    cases = [
        Case(prompt="a", source=picture, metadata={"objects": objects, "index": k})
        for k, (picture, objects) in enumerate([(pictures[0], ["cat", "dog"]), (pictures[1], ("dog", "cat"))])
    ]

    def keys(reward: Any, *more: Case) -> list[str]:
        return [key_of(reward, case) for case in (*cases, *more)]

    assert keys(Light()) == ["a", "a"]
    for spec in ("compbench", {"psnr": {"against": "source"}}, {"router": {"routes": {"x": "compbench"}}}):
        found = keys(make_reward(spec), Case(prompt="a"))
        assert len(set(found)) == 3
        assert found[2] == "a"
        assert found[0].startswith("a #")
    edits = Light("edits")
    edits.modality = "edit"
    assert len(set(keys(edits))) == 2
    listed = Case(prompt="a", metadata={"objects": ["dog", "cat"], "seed": 3})  # as JSON gives a tuple back
    assert keys(make_reward("compbench"), listed)[1:] == [key_of(make_reward("compbench"), listed)] * 2
    with pytest.raises(ConfigError, match="holds a object, which cannot be told"):
        key_of(make_reward("compbench"), Case(prompt="a", metadata={"objects": object()}))


def test_a_table_says_what_its_keys_were_made_of() -> None:
    reward = make_reward({"masked": {"inner": Light(), "monitor": Light("dark"), "target": "usual"}})
    assert describe(reward)["reads"] == ["usual"]
    assert "reads" not in describe(Light())


def test_calibrate_reads_metadata_and_pictures_of_what_it_scores(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_text("no picture")
    inputs = [{"source": tmp_path / f"{name}.png"} for name in ("red", "blue", "blue", "broken")]
    entries = [
        Entry(name=str(k), picture=tmp_path / "red.png", prompt="a", metadata={"objects": k % 2, "seed": k}, inputs=row)
        for k, row in enumerate(inputs)
    ]
    for spec, kept in (("compbench", [2, 2]), ({"psnr": {"against": "source"}}, [1, 2, 1]), ("brightness", [4])):
        reward, path = make_reward(spec), str(tmp_path / f"{len(kept)}.json")
        add(path, BASE, entries, [Column(reward, 1.0, [0.0, 1.0, 2.0, 3.0])])
        (found,) = read_tables(path)
        assert [len(row) for row in found.prompts.values()] == kept
        case = entries[1].load()[1]
        assert found.references(key_of(reward, case), "error").tolist()[0] == (0.0 if kept == [4] else 1.0)
