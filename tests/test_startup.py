"""How long it takes before anything happens, as ratios in one run."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

RUNS = 7


def seconds(code: str) -> float:
    """The fastest of several fresh interpreters: what is left when nothing else disturbs."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


def test_importing_diffalign_costs_less_than_starting_python_three_more_times() -> None:
    assert seconds("import diffalign") < 4 * seconds("pass")


def test_help_costs_at_most_three_bare_imports_of_the_cli_library() -> None:
    help_of = "from diffalign.cli import main; raise SystemExit(main(['--help']))"
    assert seconds(help_of) < 3 * seconds("import typer, rich.console")


@pytest.mark.parametrize("code", ["import diffalign", "from diffalign.cli import main; main(['--help'])"])
def test_no_heavy_package_is_imported_to_say_hello(code: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'open_clip', 'accelerate', 'peft', 'numpy', 'scipy', 'PIL'}"
    checked = f"{code}\nimport sys; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", checked], check=True, stdout=subprocess.DEVNULL)
