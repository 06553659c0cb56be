"""The tree of verbs and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from diffalign.cli import bench, check, demo, gallery, generate, ls, rubric, score, train, zoo
from diffalign.cli.verb import Verb, add
from diffalign.errors import DiffalignError

_PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "no_args_is_help": True,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
_TOP: tuple[type[Verb], ...] = (
    demo.Demo,
    generate.Generate,
    score.ScoreImages,
    train.Train,
    gallery.Gallery,
    ls.List,
    check.Check,
)

INTERRUPTED = 130
ABOUT = """Make the diffusion model you already use follow your intent better, measured.

Start with `diffalign demo`. Every verb takes --config FILE and trailing key=value overrides, --dry-run, --json FILE
and --debug; `diffalign VERB --help` teaches by example.
"""


def build_app() -> typer.Typer:
    """All verbs; none of them imports torch before it runs."""
    app = typer.Typer(name="diffalign", help=ABOUT, **_PLAIN)
    for verb in _TOP:
        add(app, verb)
    for name, about, verbs in (
        ("zoo", "The tiny models that ship with diffalign, and the recipes that rebuild them.", zoo.VERBS),
        ("bench", "Measure diffalign itself.", bench.VERBS),
        ("rubric", "Rubrics that pictures are judged by: written by a judge, checked, edited by you.", rubric.VERBS),
    ):
        group = typer.Typer(help=about, **_PLAIN)
        for verb in verbs:
            add(group, verb)
        app.add_typer(group, name=name)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb: 0 done, 2 an error the message explains, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    command = typer.main.get_command(build_app())
    try:
        with _quiet(debug):
            code = int(command.main(args=words, prog_name="diffalign", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as e:
        if debug:
            raise
        print(_message(e), file=sys.stderr)
        return 2
    if code == INTERRUPTED:  # raised above, or turned into an exit code by the option parser
        print("interrupted; finished files are whole, nothing is half-written.", file=sys.stderr)
    return code


def _message(error: Exception) -> str:
    """What happened and what to do, without a traceback."""
    if isinstance(error, DiffalignError):
        return f"{type(error).__name__}: {error}"
    usage = getattr(error, "format_message", None)  # what the option parser raises
    if usage is not None:
        context = getattr(error, "ctx", None)
        hint = f" Run `{context.command_path} --help`." if context else ""
        return f"{usage()}{hint}"
    text = " ".join(str(error).split())[:500]
    return f"unexpected {type(error).__name__}: {text}\nRun the same command with --debug to see where it comes from."


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Only our own warnings, one line each, unless debugging."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module=r"diffalign\b")
            warnings.showwarning = _show
        yield


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
