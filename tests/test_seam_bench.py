"""The cost of the seam, as ratios from one run; the aims themselves are checked with `diffalign bench seam` on a
quiet machine.
"""

import pytest

from diffalign.bench.seam import SeamBench, measure
from diffalign.errors import ConfigError


def test_the_bench_reports_both_ratios_from_one_run():
    found = measure(SeamBench(model_ms=8, steps=3, repeats=3, rollouts=1))
    assert {"predict_ratio", "rollout_ratio"} <= found.keys()
    assert 0.5 < found["predict_ratio"] < 3
    assert 0.5 < found["rollout_ratio"] < 3


def test_a_bench_without_repeats_is_refused():
    with pytest.raises(ConfigError, match=r"bench\.repeats"):
        SeamBench(repeats=0)


@pytest.mark.slow
def test_predict_stays_within_five_percent_and_a_rollout_within_two():
    found = measure(SeamBench(repeats=25, rollouts=5))
    assert found["predict_ratio"] <= 1.05
    assert found["rollout_ratio"] <= 1.02
