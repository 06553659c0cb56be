"""The few exceptions users see: each says what happened, why it matters, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DiffalignError(Exception):
    """Base of everything a user can fix; the command line prints it without a traceback and exits with 2."""


class ConfigError(DiffalignError):
    """A setting has the wrong name, type or value; the message carries the path to it."""


class UnknownName(DiffalignError):
    """A name that no registry knows."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str], listing: str) -> UnknownName:
        """Build the message with the nearest known name and the command that lists them all."""
        names = sorted(known)
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return cls(
            f"no {kind} called '{name}'.{hint} Known: {', '.join(names) or 'none'}. Run `{listing}` to see more."
        )


class MissingExtra(DiffalignError):
    """A feature whose optional dependency is not installed."""

    @classmethod
    def of(cls, who: str, needs: str, extra: str) -> MissingExtra:
        return cls(f'{who} needs {needs}. Install it with: pip install "diffalign[{extra}]"')


class NotDifferentiable(DiffalignError):
    """A gradient was asked of something that has none."""


class InvalidReward(DiffalignError):
    """A reward broke its contract: infinite, wrong shape, or every candidate invalid."""


class MediaError(DiffalignError):
    """An image or video that cannot be read."""


class ModelError(DiffalignError):
    """The model produced NaN, or lacks what the call needs."""


class SeamError(DiffalignError):
    """A pipeline does something the scheduler seam cannot follow; the message says which capability failed."""


class HubError(DiffalignError):
    """A hub id that cannot be fetched from here."""


class OutputError(DiffalignError):
    """A place that cannot be written."""


class BudgetError(DiffalignError):
    """A budget too small for even one candidate."""
