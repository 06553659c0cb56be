from __future__ import annotations

import math
import time
from typing import Any

import pytest

from diffalign.bench.judge_server import JudgeServerBench, measure
from diffalign.errors import ConfigError, ModelError
from tests.judges.scripted import Says, chat, likely, serving

LIKELY = likely(Yes=math.log(0.75), No=math.log(0.25))
SMALL = JudgeServerBench(at_once=(1, 4), questions=12, rounds=3, side=8)


@pytest.mark.slow
def test_a_server_that_answers_four_at_once_answers_nearly_four_times_as_many() -> None:
    def script(path: str, body: Any, count: int) -> Says:
        time.sleep(0.05)
        return Says(chat("Yes", logprobs=LIKELY))

    with serving(script) as heard:
        found = measure(heard.url, SMALL)
    for kind in ("reply", "decide"):
        assert found[kind]["1"]["gain"] == {"mean": 1.0, "lo": 1.0, "hi": 1.0}
        assert found[kind]["1"]["per_second"] < 20
        gain = found[kind]["4"]["gain"]
        assert 2 < gain["lo"] <= gain["mean"] <= gain["hi"] < 6
    assert found["repeated"] == {"first": 24, "again": 0, "same": True}


def test_a_server_that_fails_gives_no_rate() -> None:
    with (
        serving(lambda path, body, count: Says({"error": {"message": "no"}}, 400)) as heard,
        pytest.raises(ModelError, match="does not answer all questions"),
    ):
        measure(heard.url, SMALL)


@pytest.mark.parametrize("wrong", [{"at_once": ()}, {"at_once": (0,)}, {"at_once": (2, 2)}, {"questions": 0}])
def test_settings_that_measure_nothing_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"bench\."):
        JudgeServerBench(**wrong)
