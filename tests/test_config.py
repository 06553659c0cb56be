from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign import config
from diffalign.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    particles: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.particles < 2:
            raise ConfigError(f"inner.particles is {self.particles}, but resampling needs at least 2.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    many: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    words: list[str] = dataclasses.field(default_factory=list)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    either: int | str = 0
    place: Path = Path("out")
    flag: bool = False
    anything: Any = None


numbers = st.floats(allow_nan=False)
inners = st.builds(Inner, particles=st.integers(2, 99), temperature=numbers)
outers = st.builds(
    Outer,
    name=st.text(),
    inner=inners,
    maybe=st.none() | inners,
    many=st.lists(inners, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), numbers),
    words=st.lists(st.text()),
    weights=st.dictionaries(st.text(), numbers),
    mode=st.sampled_from(["fast", "slow"]),
    limit=st.none() | st.integers(),
    either=st.integers() | st.text(),
    flag=st.booleans(),
)


@given(outers)
def test_a_dumped_config_builds_back_the_same_object(outer: Outer) -> None:
    assert config.build(Outer, config.parse(config.dump(outer), "dump")) == outer


def test_a_config_file_is_read_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\ninner: {temperature: 1e-4}\nmany: [{particles: 3}]\n")
    built = config.read(
        Outer, path, ["inner.particles=16", "limit=null", "maybe.temperature=2", "mode=slow", "flag=true"]
    )
    assert built.inner == Inner(particles=16, temperature=1e-4)
    assert built.many == (Inner(particles=3),)
    assert built.maybe == Inner(temperature=2.0)
    assert (built.limit, built.mode, built.flag) == (None, "slow", True)


def test_building_leaves_the_mapping_as_it_was() -> None:
    mapping: dict[str, Any] = {"name": "a", "inner": {"particles": 4}}
    config.build(Outer, mapping, ["inner.particles=5"])
    assert mapping == {"name": "a", "inner": {"particles": 4}}


@pytest.mark.parametrize(
    ("mapping", "overrides", "says"),
    [
        (
            {"name": "a", "inner": {"particle": 3}},
            [],
            r"unknown key 'inner.particle'. Did you mean 'inner.particles'\?",
        ),
        (
            {"name": "a", "many": [{"particles": "x"}]},
            [],
            r"many\[0\].particles is 'x' \(str\), but it takes a whole number",
        ),
        ({"name": "a", "inner": {"particles": 2.5}}, [], r"inner.particles is 2.5 \(float\)"),
        ({"name": "a", "limit": True}, [], r"limit is True \(bool\), but it takes a whole number"),
        ({"name": "a", "flag": 1}, [], "flag is 1 .*true or false"),
        ({"name": "a", "mode": "slwo"}, [], "mode is 'slwo' .* one of 'fast', 'slow'. Did you mean 'slow'"),
        ({"name": "a", "pair": [1]}, [], "pair is .* a list of 2"),
        ({"name": "a", "inner": 3}, [], "inner is 3 .* a mapping with the keys of Inner"),
        ({"name": "a", "weights": {"clip": "much"}}, [], "weights.clip is 'much'"),
        ({"name": "a", "either": 1.5}, [], "either is 1.5 .* a whole number or text"),
        ({}, [], "no value for name"),
        ({"name": "a"}, ["inner.particles"], "not of the form key=value"),
        ({"name": "a"}, ["name.x=1"], "goes into 'name', which is 'a'"),
        ({"name": "a"}, ["inner.particles=[1"], "not valid YAML"),
        ({"name": "a"}, ["inner.particles=1"], "at least 2"),
    ],
)
def test_a_wrong_setting_names_path_value_and_expected_type(
    mapping: dict[str, Any], overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        config.build(Outer, mapping, overrides)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "a mapping"),
        ("a: [", "not valid YAML"),
        ("name: a\nname: b", "'name' appears twice"),
        ("\tname: a", "YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        config.read(Outer, tmp_path / "c.yaml")


def test_an_absent_or_binary_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match="cannot read the config"):
            config.read(Outer, tmp_path / name)


def test_where_prefixes_every_path() -> None:
    with pytest.raises(ConfigError, match=r"train.yaml.inner.x"):
        config.build(Outer, {"name": "a", "inner": {"x": 1}}, where="train.yaml")
