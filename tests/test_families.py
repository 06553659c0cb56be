"""The seam holds on every family, and docs/families.md says so."""

import pytest
import torch

from diffalign.conformance import CAPABILITIES, check
from tests.families import COLUMNS, PAGE, alone_versus_batch
from tests.tiny import FAMILIES, build, call

NAMES = [name for name, family in FAMILIES.items() if not family.broken]
REQUIRED = [
    "sd15_ddim",
    "sd15_dpmpp_2m",
    "sd15_euler",
    "sd15_euler_ancestral",
    "sd15_lcm",
    "sdxl",
    "instruct_pix2pix",
    "sd_controlnet",
    "sd3",
    "sd3_controlnet",
    "flux",
    "flux_kontext",
    "pixart_sigma",
    "sana",
    "qwen_image",
    "qwen_image_edit",
    "aura_flow",
    "lumina2",
    "z_image",
    "hunyuan_dit",
    "cogvideox",
    "ltx_video",
    "wan21",
    "wan22",
    "hunyuan_video",
]


def documented() -> dict[str, list[str]]:
    rows = [
        line.strip("| \n").split(" | ")
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    return {cells[0]: cells[3:] for cells in rows[1:]}


@pytest.mark.parametrize(
    "name", [name if name in REQUIRED else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_capability_holds_as_documented(name):
    report = check(build(name), **call(name))
    written = dict(zip(["schedule", "restore", *COLUMNS], documented()[name], strict=False))
    for capability in CAPABILITIES:
        found = report.capabilities[capability]
        assert found.ok, f"{capability}: {found.reason} (error {found.error})"
        assert not written[capability].startswith("**no**")
        if written[capability] == "0" and capability != "gradient":
            assert found.error == 0.0


def test_the_page_lists_every_family_the_seam_is_held_to():
    assert set(REQUIRED) <= set(documented())
    assert set(documented()) == set(NAMES)


@pytest.mark.parametrize("name", ["sd15_ddim", "sdxl", "sd3", "flux", "qwen_image", "wan21"])
def test_a_case_walks_the_same_alone_and_in_a_batch(name):
    torch.set_num_threads(1)
    difference = alone_versus_batch(name)
    assert difference is not None
    assert difference < 1e-3
