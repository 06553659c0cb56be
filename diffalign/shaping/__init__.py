"""Raw rewards made comparable: bounded shapes, calibration against samples of a base model, ensembles.

Rewards r are (B,), references (M,) for all rows or (B, M), members of an ensemble (B, N); results have the shape of r
and its float type, float32 at least. NaN marks what could not be judged: such a row stays NaN, such a reference counts
nowhere, and a row without references is NaN. Nothing given is changed in place.
"""

from diffalign.shaping.ensembles import disagreement, gate, lcb, mean, median, softmin, trimmed, uwo, worst
from diffalign.shaping.references import calibrate_cdf, centred, lsc, par, smooth_cdf, tilt
from diffalign.shaping.running import Running, mean_std, minmax, running_clip

__all__ = [
    "Running",
    "calibrate_cdf",
    "centred",
    "disagreement",
    "gate",
    "lcb",
    "lsc",
    "mean",
    "mean_std",
    "median",
    "minmax",
    "par",
    "running_clip",
    "smooth_cdf",
    "softmin",
    "tilt",
    "trimmed",
    "uwo",
    "worst",
]
