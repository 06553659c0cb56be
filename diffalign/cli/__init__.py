"""The command line: `main(argv)` runs one verb and gives back the exit code; each verb is one small file."""

from __future__ import annotations

from diffalign.cli.app import main

__all__ = ["main"]
