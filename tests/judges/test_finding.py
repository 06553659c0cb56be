from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diffalign import registry
from diffalign.errors import ConfigError, ModelError
from diffalign.judges.asking import Decision, Question, Reply
from diffalign.judges.finding import EMBEDDED, find_judge
from diffalign.judges.local import LocalJudge
from tests.judges import tiny_judges


class Scripted:
    name, most_images = "scripted", 2

    @property
    def version(self) -> str | None:
        raise AssertionError("nobody asked for it")

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        return [Reply("Yes")] * len(questions)

    def decide(self, decisions: Sequence[Decision]) -> list[tuple[float, ...] | None]:
        return [None] * len(decisions)


def test_a_backend_is_taken_as_it_is() -> None:
    backend = Scripted()
    assert find_judge(backend) is backend


def test_a_folder_is_a_judge_in_this_process_loaded_once_for_all(tmp_path: Path) -> None:
    folder = str(tiny_judges.folder(tmp_path / "m"))
    one = find_judge(folder)
    assert isinstance(one, LocalJudge)
    assert find_judge(folder) is one
    assert find_judge({"model": folder}) is one
    other = find_judge({"model": folder, "dtype": "float32", "batch": 2})
    assert other is not one
    assert find_judge({"batch": 2, "dtype": "float32", "model": folder}) is other


def test_another_model_at_the_same_path_is_another_judge(tmp_path: Path) -> None:
    place = tiny_judges.folder(tmp_path / "m")
    one = find_judge(str(place))
    before = one.version
    shutil.rmtree(place)
    tiny_judges.folder(place, seed=1)
    other = find_judge(str(place))
    assert other is not one
    assert (one.version, other.version) == (before, LocalJudge(str(place)).version)
    assert one.version != other.version


def test_a_judge_that_nothing_uses_is_let_go(tmp_path: Path) -> None:
    folder = str(tiny_judges.folder(tmp_path / "m"))
    seen = weakref.ref(find_judge(folder))
    gc.collect()
    assert seen() is None


def test_the_default_ships_with_the_package_and_brings_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tiny_judges.folder(tmp_path / "m")
    (place / "card.json").write_text('{"judge": {"pixels": 4096, "batch": 3}}')
    monkeypatch.setattr(registry, "embedded", lambda name: place if name == EMBEDDED else tmp_path / "none")
    found = find_judge()
    assert isinstance(found, LocalJudge)
    assert (found.model, found.pixels, found.batch) == (str(place), 4096, 3)
    assert find_judge(EMBEDDED) is found
    own = find_judge({"model": EMBEDDED, "batch": 5})
    assert isinstance(own, LocalJudge)
    assert (own.pixels, own.batch) == (4096, 5)


def test_a_default_that_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    with pytest.raises(ModelError, match="diffalign zoo build shapes-vlm"):
        find_judge()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "empty"),
        (7, "which cannot be asked"),
        (None, "which cannot be asked"),
        (Scripted, "which cannot be asked"),
        ({}, "names neither a model nor a server"),
        ({"model": None}, "names neither"),
        ({"model": "a/b", "temprature": 1}, "the setting 'temprature'"),
        ({"model": "a/b", "batch": 0}, "Give a whole number"),
    ],
)
def test_what_is_no_judge_is_refused(spec: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_judge(spec)


def test_addresses_are_judges_on_a_server() -> None:
    endpoint = pytest.importorskip("diffalign.judges.endpoint")
    one = find_judge("http://127.0.0.1:9/v1#some/model")
    assert isinstance(one, endpoint.EndpointJudge)
    assert find_judge("http://127.0.0.1:9/v1#some/model") is one
    assert find_judge({"url": "http://127.0.0.1:9/v1", "model": "some/model"}) is one
    assert find_judge("http://127.0.0.1:9/v1#another") is not one
    with pytest.raises(ConfigError, match="on a server"):
        find_judge({"url": "http://127.0.0.1:9/v1", "pixel": 3})


def test_an_address_without_its_scheme_is_told_to_have_one() -> None:
    for spec in ("127.0.0.1:8000/v1", "localhost:8000#model"):
        with pytest.raises(ConfigError, match=f"Write http://{spec}"):
            find_judge(spec)


def test_space_around_a_name_does_not_matter() -> None:
    assert find_judge("  http://127.0.0.1:9/v1#m ") is find_judge("http://127.0.0.1:9/v1#m")
