from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffalign.judges.local import LocalJudge
from tests.judges import tiny_judges


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


@pytest.fixture(scope="session")
def judge(shelf: Path) -> Callable[..., LocalJudge]:
    """A judge of a kind, made once for each set of settings; a random one decides by labels that it would not say."""
    made: dict[str, LocalJudge] = {}

    def find(kind: str = "internvl", **settings: Any) -> LocalJudge:
        key = f"{kind} {settings}"
        if key not in made:
            made[key] = LocalJudge(str(tiny_judges.folder(shelf / kind, kind)), **{"covered": 0.0, **settings})
        return made[key]

    return find
