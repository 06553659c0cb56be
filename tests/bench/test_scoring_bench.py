"""What scores cost; the aims themselves are checked with `diffalign bench scoring` on a quiet machine."""

from __future__ import annotations

import open_clip
import pytest

from diffalign.bench.scoring import ScoringBench, measure
from diffalign.errors import ConfigError, UnknownName


def test_the_bench_reports_both_ratios_from_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", small)
    found = measure(ScoringBench(architecture="tiny", images=4, side=48, repeats=2))
    for name in ("batch", "cache"):
        assert found[f"{name}_ratio_range"][0] <= found[f"{name}_ratio"] <= found[f"{name}_ratio_range"][1]


def test_a_wrong_size_or_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bench\.images is 0"):
        ScoringBench(images=0)
    with pytest.raises(UnknownName, match=r"Did you mean 'ViT-B-32'\?"):
        measure(ScoringBench(architecture="ViT-B-23"))
