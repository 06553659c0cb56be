"""Raw rewards made comparable: bounded shapes, calibration against samples of a base model, ensembles, advantages.

Rewards r are (B,), references (M,) for all rows or (B, M), members of an ensemble (B, N); results have the shape of r
and its float type, float32 at least. NaN marks what could not be judged: such a row stays NaN, such a reference counts
nowhere, and a row without references is NaN. Nothing given is changed in place.

Advantages compare rewards (N,) with those of their group, named by integer ids `gid` (N,); groups may differ in size
and stand in any order. Here NaN counts in no statistic and its advantage is 0, and so is that of a group of one.
"""

from diffalign.shaping.advantages import (
    adv_batch,
    adv_dr,
    adv_global_std,
    adv_grpo,
    adv_rloo,
    frac_zero_std,
    group_filter,
    win_rate,
    win_rate_judged,
)
from diffalign.shaping.decoupled import combine, gdpo, joint
from diffalign.shaping.ensembles import disagreement, gate, lcb, mean, median, softmin, trimmed, uwo, worst
from diffalign.shaping.groups import Statistics, joint_ids, statistics
from diffalign.shaping.hardness import data_hardness, hardness_scale, responsiveness
from diffalign.shaping.hybrid import group_reference, hybrid, length_mask, length_penalty, outside
from diffalign.shaping.references import calibrate_cdf, centred, lsc, par, smooth_cdf, tilt
from diffalign.shaping.running import Running, mean_std, minmax, running_clip
from diffalign.shaping.stepwise import renorm, return_to_go, step_norm
from diffalign.shaping.tmn import tmn

__all__ = [
    "Running",
    "Statistics",
    "adv_batch",
    "adv_dr",
    "adv_global_std",
    "adv_grpo",
    "adv_rloo",
    "calibrate_cdf",
    "centred",
    "combine",
    "data_hardness",
    "disagreement",
    "frac_zero_std",
    "gate",
    "gdpo",
    "group_filter",
    "group_reference",
    "hardness_scale",
    "hybrid",
    "joint",
    "joint_ids",
    "lcb",
    "length_mask",
    "length_penalty",
    "lsc",
    "mean",
    "mean_std",
    "median",
    "minmax",
    "outside",
    "par",
    "renorm",
    "responsiveness",
    "return_to_go",
    "running_clip",
    "smooth_cdf",
    "softmin",
    "statistics",
    "step_norm",
    "tilt",
    "tmn",
    "trimmed",
    "uwo",
    "win_rate",
    "win_rate_judged",
    "worst",
]
