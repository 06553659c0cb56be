from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffalign.errors import OutputError
from diffalign.judges.request_cache import RequestCache, default_path, key_of
from diffalign.sqlite_file import MAGIC

WRITES = """
import sys
from diffalign.judges.request_cache import RequestCache
cache = RequestCache(sys.argv[1])
for k in range(60):
    cache.store(f"there-{k}", {"text": str(k)})
    assert cache.lookup([f"there-{k}"])
"""


def test_what_is_stored_is_found_again_by_another_cache(tmp_path: Path) -> None:
    RequestCache(tmp_path / "c.sqlite").store("a", {"text": "grün", "problem": ""})
    again = RequestCache(tmp_path / "c.sqlite")
    assert again.lookup(["a", "b", "a"]) == {"a": {"text": "grün", "problem": ""}}
    assert len(again) == 1


def test_many_keys_at_once_are_found(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path / "c.sqlite")
    for k in range(30):
        cache.store(str(k), k)
    assert cache.lookup([str(k) for k in range(1200)]) == {str(k): k for k in range(30)}


def test_a_cache_without_a_path_keeps_nothing() -> None:
    cache = RequestCache(None)
    cache.store("a", 1)
    assert cache.lookup(["a"]) == {}
    assert len(cache) == 0


def test_processes_and_threads_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    other = subprocess.Popen([sys.executable, "-c", WRITES, str(path)])
    cache = RequestCache(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: cache.store(f"here-{k}", k), range(60)))
        while other.poll() is None:  # so that the two do meet, however long the other takes to start
            cache.store("again", 1)
    assert other.wait(timeout=60) == 0
    assert len(cache) == 121


def test_an_unreadable_file_is_set_aside_and_a_new_one_starts(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    cache = RequestCache(path)
    with pytest.warns(UserWarning, match="unreadable"):
        assert cache.lookup(["a"]) == {}
    cache.store("a", 1)
    assert cache.lookup(["a"]) == {"a": 1}
    assert (tmp_path / "c.sqlite.unreadable").exists()


def test_a_damaged_row_counts_as_absent(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path / "c.sqlite")
    cache.store("a", 1)
    cache.store("b", 2)
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        db.execute("UPDATE answers_1 SET answer = '{\"text' WHERE key = 'a'")
    assert cache.lookup(["a", "b"]) == {"b": 2}


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Give `cache` another path, or false"):
        RequestCache(tmp_path / "file" / "c.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot use the request cache"):
        RequestCache(tmp_path / "folder").lookup(["a"])


def test_answers_lie_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "judges" / "requests.sqlite"


def test_keys_tell_every_difference_and_no_order() -> None:
    asked = {"model": "m", "text": "a", "seed": 0, "labels": ("Yes", "No")}
    assert key_of(asked) == key_of(dict(reversed(asked.items())))
    others = [
        {**asked, "model": "n"},
        {**asked, "text": "a "},
        {**asked, "seed": 1},
        {**asked, "labels": ("No", "Yes")},
    ]
    assert len({key_of(one) for one in [asked, *others]}) == 5
    assert key_of({"text": "half a character \ud800"})


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"important": 1}' * 100)
    with pytest.raises(OutputError, match=r"another kind of file .* left alone"):
        RequestCache(mine).lookup(["a"])
    with pytest.raises(OutputError, match="left alone"):
        RequestCache(mine).store("a", 1)
    assert mine.read_text() == '{"important": 1}' * 100
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_a_damaged_cache_of_any_name_is_set_aside_and_never_over_another(tmp_path: Path) -> None:
    place = tmp_path / "answers"
    for damage in (b"first", b"second", b"third"):
        place.write_bytes(MAGIC + damage * 1000)
        with pytest.warns(UserWarning, match="unreadable"):
            assert RequestCache(place).lookup(["a"]) == {}
    kept = [tmp_path / f"answers.unreadable{end}" for end in ("", "-2", "-3")]
    assert [path.read_bytes()[16:20] for path in kept] == [b"firs", b"seco", b"thir"]


def test_a_cache_that_cannot_be_written_still_answers() -> None:
    with tempfile.TemporaryDirectory() as held:  # pytest's own folder is closed to other users
        folder, path = Path(held), Path(held) / "c.sqlite"
        RequestCache(path).store("a", 1)
        folder.chmod(0o555)
        path.chmod(0o444)
        if os.geteuid() == 0:
            os.seteuid(65534)  # nothing is read-only to root
        try:
            cache = RequestCache(path)
            assert cache.lookup(["a", "b"]) == {"a": 1}
            with pytest.raises(OutputError, match="cannot use the request cache"):
                cache.store("b", 2)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            folder.chmod(0o755)
