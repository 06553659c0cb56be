"""`diffalign rubric`: rubrics as files, written by a judge, checked and edited by people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.cases import Case
    from diffalign.data.preferences import Comparison
    from diffalign.judges.asking import Backend
    from diffalign.judges.rubric_files import Rubric
    from diffalign.judges.rubric_writing import Contrasted

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RubricWrite(Verb):
    """Write a rubric for every prompt: the judge splits it into yes-or-no checks. Each is a YAML file in OUT.

    Prompts that OUT has a rubric for are left alone. Score by them: -r '{rubric: {rubric: rubrics}}'.

    \b
    diffalign rubric write prompts.txt --out rubrics
    diffalign rubric write prompts.jsonl --judge http://127.0.0.1:8000/v1#my-model --out rubrics
    """

    NAME: ClassVar[str] = "write"
    prompts: Annotated[str, Opt("A .txt (one prompt a line), .jsonl or .csv file.", positional=True)]
    judge: Annotated[str, Opt("shapes-vlm, a folder or hub id, or the address of a server.")] = "shapes-vlm"
    items: Annotated[int, Opt("Most checks of a rubric.")] = 10
    batch: Annotated[int, Opt("Prompts asked at once.")] = 16
    out: Annotated[str | None, Opt("Folder of the rubrics.")] = "out/rubrics"

    def __post_init__(self) -> None:
        for name in ("items", "batch"):
            _require_positive(name, getattr(self, name))

    def cost(self) -> dict[str, Any]:
        return {"questions": len(self.cases()), "writes": self.out}

    def cases(self) -> list[Case]:
        """The prompts, each once."""
        from diffalign.cli import score_prompts

        known: dict[str, Case] = {}
        for case in score_prompts.read(Path(self.prompts)):
            known.setdefault(case.prompt, case)
        return list(known.values())

    def run(self) -> Rows:
        from diffalign import atomic
        from diffalign.cases import batched
        from diffalign.judges.rubric_files import RubricFolder
        from diffalign.judges.rubric_writing import RubricWriter

        place = atomic.require_folder(self.out or "out/rubrics")
        book, backend = RubricFolder(place), _judge(self.judge)
        writer = RubricWriter(lambda: backend, book, most=self.items)
        rows = []
        for cases in batched(self.cases(), self.batch):
            new = [case for case in cases if book.find(case.prompt) is None]
            written = dict(zip((case.prompt for case in new), writer.rubrics(new) if new else [], strict=True))
            for case in cases:
                said = written.get(case.prompt)
                problem = "the judge's reply holds no list of questions" if said and said.rubric is None else ""
                rows.append(_row(case.prompt, book.find(case.prompt), problem) | {"new": case.prompt in written})
        _show(rows)
        print(f"{sum(row['new'] and not row['problem'] for row in rows)} written, {len(book)} rubrics in {place}")
        return rows

    def status(self, result: Rows) -> int:
        return 1 if any(row["problem"] for row in result) else 0


@dataclass(frozen=True, kw_only=True)
class RubricContrast(Verb):
    """Write rubrics from preferred pictures and others: profile each alone, write checks from the difference.

    The judge never learns which picture is preferred. A rubric is kept only if judging by it prefers that one; of
    several pairs of a prompt the first that gives such a rubric counts. PAIRS is a preference file as
    `diffalign bench rewards` reads it.

    \b
    diffalign rubric contrast pairs.jsonl --out rubrics
    diffalign rubric contrast hpdv3.json --n 100 --judge http://127.0.0.1:8000/v1#my-model --out rubrics
    """

    NAME: ClassVar[str] = "contrast"
    pairs: Annotated[str, Opt("A file of preferences.", positional=True)]
    judge: Annotated[str, Opt("shapes-vlm, a folder or hub id, or the address of a server.")] = "shapes-vlm"
    items: Annotated[int, Opt("Most checks of a rubric.")] = 10
    n: Annotated[int, Opt("Most prompts.")] = 100
    each: Annotated[bool, Opt("Test a rubric by the probability of yes of every check by itself.")] = False
    images: Annotated[str | None, Opt("Folder of the pictures, if not that of the file.")] = None
    out: Annotated[str | None, Opt("Folder of the rubrics.")] = "out/rubrics"

    def __post_init__(self) -> None:
        for name in ("items", "n"):
            _require_positive(name, getattr(self, name))

    def cost(self) -> dict[str, Any]:
        return {"questions": "up to 5 a pair", "writes": self.out}

    def run(self) -> Rows:
        from diffalign import atomic
        from diffalign.judges.rubric_files import RubricFolder

        book, backend = RubricFolder(atomic.require_folder(self.out or "out/rubrics")), _judge(self.judge)
        rows: dict[str, dict[str, Any]] = {}
        for comparison in self._comparisons():
            prompt = comparison.case.prompt
            if rows.get(prompt, {}).get("kept") or (prompt not in rows and len(rows) >= self.n):
                continue
            found = self._contrasted(backend, comparison)
            if found.kept and found.rubric is not None:
                book.add_next(found.rubric)
            rows[prompt] = _row(prompt, found.rubric, "" if found.kept else _why(found)) | {"kept": found.kept}
        listed = list(rows.values())
        if not listed:
            raise ConfigError(f"'{self.pairs}' has no pair of pictures, edits aside, of which one is preferred.")
        _show(listed)
        kept = sum(row["kept"] for row in listed)
        print(f"{kept} of {len(listed)} prompts have a rubric that finds the preferred picture")
        return listed

    def _comparisons(self) -> Iterator[Comparison]:
        """Pairs with one preferred picture; edits have no contrast here."""
        from diffalign.data.preferences import read_comparisons

        for comparison in read_comparisons(self.pairs, images=self.images):
            if comparison.source is None and min(comparison.ranks) < max(comparison.ranks):
                yield comparison

    def _contrasted(self, backend: Backend, comparison: Comparison) -> Contrasted:
        from diffalign.judges.rubric_writing import contrasted
        from diffalign.vision import to_tensor

        by_rank = sorted(zip(comparison.ranks, range(len(comparison.ranks)), strict=True))
        best, worst = (to_tensor(comparison.pictures[place].open())[0] for _, place in (by_rank[0], by_rank[-1]))
        how: Any = "each" if self.each else "together"
        return contrasted(backend, comparison.case.prompt, best, worst, most=self.items, how=how)


@dataclass(frozen=True, kw_only=True)
class RubricCheck(Verb):
    """Read rubric files or folders of them, and say what is in them or which line is wrong.

    \b
    diffalign rubric check rubrics/
    diffalign rubric check mine.yaml --json checked.json
    """

    NAME: ClassVar[str] = "check"
    files: Annotated[tuple[str, ...], Opt("Rubric files or folders.", positional=True)] = ()

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("FILES is missing: rubric files or folders.")

    def run(self) -> Rows:
        from diffalign.judges.rubric_files import SUFFIXES, RubricFolder, read_rubric

        rows: Rows = []
        for name in self.files:
            place = Path(name)
            paths = sorted(p for p in place.glob("*") if p.suffix in SUFFIXES) if place.is_dir() else [place]
            before = len(rows)
            for path in paths:
                try:
                    rubric = read_rubric(path)
                    rows.append(_row(rubric.about or "anything", rubric, "") | {"file": str(path)})
                except ConfigError as e:
                    rows.append(_row("", None, str(e)) | {"file": str(path)})
            if place.is_dir() and not any(row["problem"] for row in rows[before:]):
                RubricFolder(place)  # two rubrics of one version for one prompt are an error of the folder
        if not rows:
            raise ConfigError(f"there is no rubric in {', '.join(self.files)}. Rubrics are .yaml files.")
        _show(rows)
        return rows

    def status(self, result: Rows) -> int:
        return 2 if any(row["problem"] for row in result) else 0


def _judge(spec: str) -> Backend:
    from diffalign.cli.model import quiet_libraries
    from diffalign.judges.finding import find_judge

    quiet_libraries()
    return find_judge(spec)


def _row(about: str, rubric: Rubric | None, problem: str) -> dict[str, Any]:
    items = [] if rubric is None else [item.question for item in rubric.items]
    told = {"name": rubric.name, "version": rubric.version, "id": rubric.id} if rubric else dict[str, Any]()
    blank = {"name": None, "version": None, "id": None}
    return {"about": about, **blank, **told, "items": items, "problem": problem}


def _show(rows: Rows) -> None:
    """A table of what could be read, then what could not."""
    from diffalign.cli.ls import print_table

    sound = [row for row in rows if row["id"] and not row["problem"]]
    columns = ("name", "version", "id", "about")
    if sound:
        print_table([{**{c: row[c] for c in columns}, "items": len(row["items"])} for row in sound])
    for row in rows:
        if row["problem"]:
            print(f"{row['about'][:80]}: {row['problem']}" if row["about"] else row["problem"])


def _why(found: Contrasted) -> str:
    if found.rubric is None:
        return "the judge's profiles or its rubric could not be read"
    if found.scores is None:
        return "the judge did not answer every check"
    return f"by its rubric the preferred picture gets {found.scores[0]:.3f}, the other one {found.scores[1]:.3f}"


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}, but it must be at least 1.")


VERBS: tuple[type[Verb], ...] = (RubricWrite, RubricContrast, RubricCheck)
