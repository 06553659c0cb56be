"""`diffalign gallery`: before and after on one static page, and the votes people gave on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from diffalign.cli.model import PromptVerb
from diffalign.cli.verb import Opt, as_json, dump, words
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.cli.generate import Generate
    from diffalign.gallery.sides import Side

# What the systems of a config share unless they say otherwise.
SHARED = (
    *("model", "lora", "device", "dtype", "attention", "call"),
    *("prompt", "prompts", "split", "limit", "image_seed", "seed", "reward", "batch"),
)
VOTES = "votes"  # the first source that means the rest are files of votes


@dataclass(frozen=True, kw_only=True)
class Gallery(PromptVerb):
    """One static page that compares systems on the same prompts; open OUT/index.html, no server is needed.

    A source is a run folder of `diffalign generate`, or a folder of pictures whose names match those of the others (a
    .txt beside a picture, or prompts.txt, holds what was asked). The first source is the baseline. A config with
    `systems:` runs each of them on the same prompts and seeds first; what is done already is not done again. --heldout
    asks a reward about every picture that steered none of them. A gallery as the only source gets this version's page.

    `diffalign gallery votes FILE...` merges the votes that people exported from the page: who won, whether chance would
    do, and which rewards agree with people; --out names the merged file, --page the gallery they voted on.

    \b
    diffalign gallery out/stock out/tree
    diffalign gallery before/ after/ --name base --name lora --heldout clip --sheet sheet.png
    diffalign gallery --config shapes_methods
    diffalign gallery votes ann.jsonl ben.jsonl --page out/gallery --out votes.jsonl
    """

    NAME: ClassVar[str] = "gallery"
    sources: Annotated[tuple[str, ...], Opt("Folders to compare, or `votes` and files of votes.", positional=True)] = ()
    out: Annotated[str | None, Opt("Folder of the page; for votes, the merged file.")] = None
    title: Annotated[str, Opt("Heading of the page.")] = "Before and after"
    name: Annotated[tuple[str, ...], Opt("What to call a source; repeat it in their order.")] = ()
    heldout: Annotated[
        tuple[str, ...] | dict[str, Any], Opt("A reward to ask about every picture; repeat to ask several.")
    ] = ()
    sheet: Annotated[str | None, Opt("Also write a contact sheet to this PNG.")] = None
    gif: Annotated[str | None, Opt("Also write an animation that flips between the systems to this GIF.")] = None
    page: Annotated[str | None, Opt("With votes: the gallery they were given on.")] = None
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)  # name: settings of `generate`
    reward: Annotated[tuple[str, ...] | dict[str, Any], Opt("What steers the systems of a config.", flag="-r")] = ()
    batch: Annotated[int, Opt("Prompts in one pipeline call, for the systems of a config.")] = 8

    @property
    def folder(self) -> Path:
        return Path(self.out or "out/gallery")

    def __post_init__(self) -> None:
        if self.sources[:1] == (VOTES,):
            if len(self.sources) < 2:
                raise ConfigError("name at least one file of votes: `diffalign gallery votes ann.jsonl`.")
            return
        if self.page:
            raise ConfigError("page belongs to votes: `diffalign gallery votes FILE... --page FOLDER`.")
        if not self.sources and not self.systems:
            raise ConfigError("there is nothing to compare. Name run folders, or a config such as shapes_methods.")
        if self.name and len(self.name) != len(self.sources):
            raise ConfigError(f"{len(self.name)} names for {len(self.sources)} sources. Name all of them, or none.")

    def cost(self) -> dict[str, Any]:
        told = {name: self.system(settings).cost() for name, settings in self.systems.items()}
        return {"sources": len(self.sources), **{f"system {name}": cost for name, cost in told.items()}}

    def run(self) -> dict[str, Any]:
        if self.sources[:1] == (VOTES,):
            return self.count()
        from diffalign import atomic
        from diffalign.cli.truth import progress
        from diffalign.gallery import manifest, page

        if len(self.sources) == 1 and (Path(self.sources[0]) / "manifest.json").exists():
            return self.renew(Path(self.sources[0]))
        atomic.require_folder(self.folder)
        for file in (self.sheet, self.gif):
            if file:
                atomic.require_file(file)
        sides = self.sides()
        if self.systems:
            atomic.write_text(self.folder / "config.yaml", dump(self))
        heading = manifest.Heading(title=self.title, command=self.command())
        with progress(max(len(side.items) for side in sides), "entries") as advance:
            made = page.write(sides, self.folder, heading, advance, seed=self.seed)
        self.write_slides(made, self.folder)
        _print(made, self.folder)
        told = {name: made[name] for name in ("id", "summaries", "notes", "unlike")}
        return {**told, "entries": len(made["entries"]), "page": str(self.folder / "index.html")}

    def write_slides(self, made: Mapping[str, Any], folder: Path) -> None:
        from diffalign.gallery import slides

        if self.sheet:
            slides.write_sheet(made, folder, Path(self.sheet))
        if self.gif:
            slides.write_animation(made, folder, Path(self.gif))

    def sides(self) -> list[Side]:
        """Every system with its pictures and all scores."""
        from diffalign import scoring
        from diffalign.cli.model import quiet_libraries
        from diffalign.cli.truth import progress
        from diffalign.gallery import folders, systems, witnesses

        systems.require_systems(self.systems)
        quiet_libraries()
        verbs = {name: self.system(told) for name, told in self.systems.items()}  # mistakes come before the work
        specs = (
            [{name: told} for name, told in self.heldout.items()] if isinstance(self.heldout, dict) else self.heldout
        )
        witness = [scoring.make_reward(spec) for spec in specs]
        made = {name: as_json(verb) | _fingerprint(verb) for name, verb in verbs.items()}
        found = systems.run_all(made, self.folder, lambda name, folder: _run(verbs[name], name, folder))
        names = self.name or [None] * len(self.sources)
        for source, name in zip(self.sources, names, strict=True):
            side = folders.read_side(Path(source))
            found.append(dataclasses.replace(side, name=name) if name else side)
        for reward in witness:
            with progress(sum(len(side.items) for side in found), reward.name) as advance:
                found = witnesses.scored(found, reward, advance=advance)
        return found

    def system(self, told: Mapping[str, Any]) -> Generate:
        """One system: the page's own settings of `generate`, then the system's over them."""
        from diffalign import config
        from diffalign.cli.generate import Generate

        shared = {name: getattr(self, name) for name in SHARED}
        return config.build(Generate, {**shared, **told, "call": {**self.call, **told.get("call", {})}})

    def command(self) -> str:
        if self.systems:
            return "diffalign gallery --config config.yaml"  # which lies beside the page
        return words(Gallery, {"title": self.title, "name": self.name, "heldout": tuple(self.heldout)}, self.sources)

    def renew(self, folder: Path) -> dict[str, Any]:
        """Bring the page of an existing gallery up to date; its data and pictures stay."""
        from diffalign.gallery import manifest, page

        about = manifest.read(folder)
        page.put(about, folder)
        self.write_slides(about, folder)
        print(f"open {folder / 'index.html'}  (its page is this version's; data and pictures are as they were)")
        return {"id": about["id"], "entries": len(about["entries"]), "page": str(folder / "index.html")}

    def count(self) -> dict[str, Any]:
        """Merge files of votes and say what they say."""
        from diffalign import atomic
        from diffalign.gallery import manifest, votes

        merged = votes.merged([votes.read(Path(file)) for file in self.sources[1:]])
        if not merged:
            raise ConfigError("these files hold no votes. Export them from the page's voting view.")
        about = manifest.read(Path(self.page)) if self.page else None
        if about and not any(vote.page == about["id"] for vote in merged):
            raise ConfigError(f"none of these votes was given on '{self.page}'. Name the gallery they are about.")
        found = votes.results(merged, about)
        if self.out:
            atomic.require_file(self.out)
            atomic.write_jsonl(self.out, [vote.json() for vote in merged])
        _print_votes(found)
        if seen := sum(not vote.blind for vote in merged):
            print(f"left out: {seen} votes that were not blind")
        if self.out:
            print(f"{len(merged)} votes are in {self.out}")
        return {"results": found, "votes": len(merged)}


def _fingerprint(verb: Any) -> dict[str, Any]:
    """What a system is asked, and the local files it is made of: a run for something else is not this one."""
    places = [Path(place) for place in (verb.model, verb.lora) if place and Path(place).exists()]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return {
        "cases": [[case.prompt, case.seed] for case in verb.cases()],
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime] for file in files if file.is_file()],
    }


def _run(verb: Generate, name: str, folder: Path) -> None:
    print(f"{name}:", end=" ", flush=True)
    dataclasses.replace(verb, out=str(folder)).run()


def _print(manifest: Mapping[str, Any], folder: Path) -> None:
    names = [system["name"] for system in manifest["systems"]]
    for summary in manifest["summaries"]:
        for reward, row in summary["rewards"].items():
            print(
                f"{names[summary['b']]} over {names[summary['a']]}, {reward}: "
                f"{row['delta']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}], "
                f"{row['wins']} won, {row['losses']} lost, {row['ties']} tied (sign test p {row['sign_p']:.2g})"
            )
    for note in [*manifest["notes"], *manifest["unlike"]]:
        print(f"note: {note}")
    print(f"open {folder / 'index.html'}  ({len(manifest['entries'])} entries)")
    print(f"publish it: hf upload USER/NAME {folder} . --repo-type space --exclude 'runs/*'")


def _print_votes(found: list[dict[str, Any]]) -> None:
    for row in found:
        share = row["share_b"]
        told = _range(share) if share else "none decided"
        print(
            f"{row['b']} over {row['a']}: chosen in {row['chose_b']} of {row['chose_a'] + row['chose_b']} decided "
            f"votes ({told}), {row['chose_tie']} ties, sign test p {row['sign_p']:.2g}; {row['voters']} voters"
        )
        between = row["between_voters"]
        if between["n"]:
            print(f"  voters agree with each other in {between['share']:.2f} of {between['n']} pairs of votes")
        for name, agreed in row["rewards"].items():
            if agreed["n"]:
                print(f"  {name} agrees in {_range(agreed)} of {agreed['n']}")


def _range(row: Mapping[str, float]) -> str:
    return f"{row['mean']:.2f} [{row['lo']:.2f}, {row['hi']:.2f}]"
