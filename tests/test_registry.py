from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import loading, registry
from diffalign.cases import Case
from diffalign.errors import ConfigError, ModelError, UnknownName
from diffalign.scoring import make_reward, score

CASES = [Case(prompt="a"), Case(prompt="b")]
MEDIA = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_pipelines", dict(registry._pipelines))
    monkeypatch.setattr(loading, "_warned", set())
    before = set(registry._rewards)
    yield
    for name in set(registry._rewards) - before - set(registry.cards()):
        del registry._rewards[name]


@pytest.fixture
def user_file(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "neighbour.py").write_text("FACTOR = 2.0\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from neighbour import FACTOR\n"
        "from diffalign.registry import register_reward\n"
        "def plain(media, cases):\n    return media.mean((1, 2, 3)) * FACTOR\n"
        "@register_reward('listed', differentiable=True, version='3')\n"
        "class Listed:\n"
        "    def __init__(self, power: float = 1.0):\n        self.power = power\n"
        "    def __call__(self, media, cases):\n        return media.mean((1, 2, 3)) ** self.power\n"
    )
    yield path
    for name in ("neighbour", "mine"):  # another test in this process may write a module of the same name
        sys.modules.pop(name, None)


def _point(value: str, name: str = "theirs") -> EntryPoint:
    return EntryPoint(name, value, registry.REWARDS)


def _install(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr(loading, "entry_points", lambda group: [p for p in points if p.group == group])


def test_unknown_reward_name_suggests_the_nearest() -> None:
    with pytest.raises(
        UnknownName, match=r"no reward called 'clp'. Did you mean 'clip'\?.*brightness.*diffalign ls rewards"
    ):
        make_reward("clp")


def test_a_plain_function_in_a_file_works_without_decoration(user_file: Path) -> None:
    reward = make_reward(f"{user_file}:plain")
    assert (reward.name, reward.differentiable, reward.modality, reward.version) == ("plain", False, "image", None)
    assert torch.allclose(score(reward, MEDIA, CASES).total, MEDIA.mean((1, 2, 3)) * 2)


def test_a_file_address_may_carry_a_weight(user_file: Path) -> None:
    found = score(make_reward(f"{user_file}:plain:0.5"), MEDIA, CASES)
    assert torch.allclose(found.total, MEDIA.mean((1, 2, 3)))
    assert list(found.parts) == ["plain"]


def test_a_class_in_a_file_is_instantiated_with_its_options(user_file: Path) -> None:
    reward = make_reward({f"{user_file}:Listed": {"power": 2, "weight": 1.0}})
    assert torch.allclose(score(reward, MEDIA, CASES).total, MEDIA.mean((1, 2, 3)) ** 2)
    assert make_reward(f"{user_file}:listed").name == "listed"  # its registered name works too


def test_a_module_in_the_current_folder_is_found(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_file.parent)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert make_reward("mine:plain").name == "plain"


def test_an_edited_file_is_read_again(user_file: Path) -> None:
    make_reward(f"{user_file}:plain")
    user_file.write_text("def plain(media, cases):\n    return media.amax((1, 2, 3))  # changed\n")
    assert torch.equal(score(make_reward(f"{user_file}:plain"), MEDIA, CASES).total, MEDIA.amax((1, 2, 3)))


@pytest.mark.parametrize(
    ("content", "spec", "says"),
    [
        ("x = 1/0", "f.py:r", "f.py' does not load: ZeroDivisionError"),
        ("def r(:", "f.py:r", "SyntaxError"),
        ("raise SystemExit(3)", "f.py:r", "SystemExit"),
        ("def other(m, c): ...", "f.py:othr", "no reward called 'othr'. Did you mean 'other'"),
        ("r = 3", "f.py:r", "cannot be called"),
        ("", "absent.py:r", "no file 'absent.py'"),
        ("", "no.such.module:r", "cannot import 'no.such.module'"),
        ("", "brightness:heavy", "'heavy' in 'brightness:heavy' is not a weight"),
        ("", "brightness:inf", "must be a finite number"),
        ("", ":r", "not an address"),
        ("", "", "no reward called ''"),
    ],
)
def test_a_bad_address_gives_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, spec: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.py").write_text(content)
    with pytest.raises((ConfigError, UnknownName), match=says):
        make_reward(spec)


@pytest.mark.parametrize("spec", [None, 3, [], {}, {"brightness": "much"}, {"brightness": True}, [["clip", None]]])
def test_what_is_no_reward_is_refused(spec: Any) -> None:
    with pytest.raises(ConfigError):
        make_reward(spec)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"powr": 2}, r"unknown key 'rewards.toned.powr'. Did you mean 'rewards.toned.power'\?"),
        ({"power": "big"}, r"rewards.toned.power is 'big' \(str\), but it takes a number"),
        ({}, "needs a value for power"),
    ],
)
def test_wrong_options_are_config_errors(options: dict[str, Any], says: str) -> None:
    @registry.register_reward("toned")
    class Toned:
        def __init__(self, power: float) -> None: ...

        def __call__(self, media: Tensor, cases: Sequence[Case]) -> Tensor:
            return media.mean((1, 2, 3))

    with pytest.raises(ConfigError, match=says):
        make_reward({"toned": options})


def test_a_function_takes_options_too() -> None:
    @registry.register_reward("power_mean", version="1")
    def power_mean(media: Tensor, cases: Sequence[Case], power: float = 1.0) -> Tensor:
        return media.pow(power).mean((1, 2, 3))

    assert torch.allclose(
        score(make_reward({"power_mean": {"power": 2}}), MEDIA, CASES).total, MEDIA.pow(2).mean((1, 2, 3))
    )
    with pytest.raises(ConfigError, match=r"rewards.power_mean.pwer"):
        make_reward({"power_mean": {"pwer": 2}})


def test_one_reward_twice_needs_an_alias() -> None:
    with pytest.raises(ConfigError, match="two rewards are called 'brightness'"):
        make_reward(["brightness", "brightness:2"])
    both = make_reward({"brightness": 1.0, "light": {"reward": "brightness", "weight": 2.0}})
    assert list(score(both, MEDIA, CASES).parts) == ["brightness", "light"]


def test_a_shipped_name_cannot_be_taken() -> None:
    with pytest.raises(ConfigError, match="ships with diffalign"):
        registry.register_reward("clip")(lambda media, cases: media)


def test_decorating_keeps_what_the_class_says_itself() -> None:
    @registry.register_reward("own", differentiable=True)
    class Own:
        modality = "video"
        version = "7"

    assert (Own.differentiable, Own.modality, Own.version, Own.range, Own.name) == (True, "video", "7", None, "own")


def test_every_card_matches_its_code() -> None:
    for name, card in registry.cards().items():
        target = registry.find_reward(name)
        assert target.name == name
        assert (target.differentiable, target.modality) == (card.differentiable, card.modality), name
        assert target.range == card.range, name
        assert card.meaning


def test_a_plugin_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _point("operator:add"))
    assert registry.find_reward("theirs")(1, 2) == 3
    assert "theirs" in [info.name for info in registry.rewards()]


def test_a_broken_plugin_warns_once_and_takes_nothing_down(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(
        monkeypatch,
        _point("no_such_package.rewards:R"),
        _point("operator:nothing", "half"),
        _point("operator:add", "good"),
    )
    with pytest.warns(
        UserWarning, match=r"'theirs' of the package 'unknown' does not load .*ModuleNotFoundError"
    ) as caught:
        names = [info.name for info in registry.rewards()]
    assert len(caught) == 2
    assert "good" in names
    assert "clip" in names
    assert "theirs" not in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.rewards()  # said once
        assert make_reward("brightness").name == "brightness"
    with pytest.raises(ConfigError, match="plug-in 'theirs'"):
        make_reward("theirs")


def test_a_plugin_cannot_replace_a_shipped_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _point("operator:add", "brightness"))
    with pytest.warns(UserWarning, match="a name diffalign ships"):
        registry.rewards()
    assert make_reward("brightness").name == "brightness"


def test_listing_rewards_imports_none_of_them() -> None:
    import subprocess

    code = "import sys; from diffalign import registry; registry.rewards(); print({'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_missing_dependency_shows_in_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    card = registry.Card(module="clip", meaning="x", requires=("no_such_module",))
    monkeypatch.setattr(registry, "cards", lambda: {"far": card})
    (info,) = [i for i in registry.rewards() if i.name == "far"]
    assert info.missing == ("no_such_module",)
    assert not info.installable


def test_pipelines_are_known_by_name_and_address(user_file: Path) -> None:
    user_file.write_text("class Mine: ...\n")
    assert registry.make_pipeline_class(f"{user_file}:Mine").__name__ == "Mine"
    registry.register_pipeline("session")(int)
    assert registry.make_pipeline_class("session") is int
    assert {"best_of_n", "session"} <= {p.name for p in registry.pipelines()}
    with pytest.raises(UnknownName, match=r"no pipeline called 'best_of_m'. Did you mean 'best_of_n'"):
        registry.make_pipeline_class("best_of_m")


def test_an_absent_embedded_model_says_how_to_make_it() -> None:
    with pytest.raises(ModelError, match="diffalign zoo build nothing"):
        registry.embedded("nothing")
