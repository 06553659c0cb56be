"""A judge's key is in no message and in nothing that is written."""

from __future__ import annotations

from typing import Any

import pytest

from diffalign.errors import ConfigError
from diffalign.judges.finding import find_judge
from diffalign.judges.secrets import without_secrets
from diffalign.rewards.vqascore import VQAScore
from diffalign.scoring import make_reward

KEY = "sk-very-secret"


def test_every_key_goes_and_everything_else_stays() -> None:
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m", "key": KEY}
    settings = {"reward": {"editscore": {"judge": judge, "passes": 4}}, "parts": [judge, ("clip", 2.0)], "n": 8}
    found = without_secrets(settings)
    assert KEY not in str(found)
    kept = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    told = {"reward": {"editscore": {"judge": kept, "passes": 4}}, "parts": [kept, ("clip", 2.0)], "n": 8}
    assert found == told
    assert judge["key"] == KEY  # what was given is as it was


def test_settings_of_something_called_key_are_no_secret() -> None:
    assert without_secrets({"key": {"reward": "clip", "key": KEY}}) == {"key": {"reward": "clip"}}


@pytest.mark.parametrize("value", ["key", 3, None, 0.5, True, (), [], {}])
def test_what_holds_no_mapping_is_as_it_was(value: Any) -> None:
    assert without_secrets(value) == value


def test_messages_about_a_judge_do_not_show_its_key() -> None:
    with pytest.raises(ConfigError, match="names neither") as told:
        find_judge({"modle": "a/b", "key": KEY})
    assert KEY not in str(told.value)
    with pytest.raises(ConfigError, match="takes the hub id or folder") as told:
        VQAScore(variant="t5", judge={"key": KEY, "model": "a/b"})
    assert KEY not in str(told.value)


def test_a_message_about_a_reward_does_not_show_it_either(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign import registry

    monkeypatch.setattr(registry, "find_reward", lambda name: VQAScore())
    with pytest.raises(ConfigError, match="come too late") as told:
        make_reward({"mine": {"judge": {"model": "a/b", "key": KEY}}})
    assert KEY not in str(told.value)
