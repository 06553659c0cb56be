"""`diffalign bench judges`: what a judge is worth where the truth is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from diffalign.cli.verb import Opt, Verb


@dataclass(frozen=True, kw_only=True)
class Judges(Verb):
    """What a judge is worth on the shapes world: yes-or-no answers, edits, pairs, and every protocol.

    Truth is exact: scenes and edits are rendered, generated pictures are read by the verifier. `editscore` is asked
    with one pass and with --passes on the same edits; the best of --candidates edits is held against the first; pairs
    are asked in both orders.

    \b
    diffalign bench judges --json judges.json
    diffalign bench judges --judge http://127.0.0.1:8000/v1 --questions 100 --edits 50
    """

    NAME: ClassVar[str] = "judges"
    judge: Annotated[str, Opt("`shapes-vlm`, a model's folder or hub id, or the address of a server.")] = "shapes-vlm"
    questions: Annotated[int, Opt("Yes-or-no questions; of the embedded judge only.")] = 1000
    edits: Annotated[int, Opt("Edits to rate.")] = 300
    passes: Annotated[int, Opt("Passes of editscore that are held against one.")] = 4
    choices: Annotated[int, Opt("Edits to pick the best of several of.")] = 60
    candidates: Annotated[int, Opt("How many to pick from.")] = 8
    pairs: Annotated[int, Opt("Pairs to compare, each in both orders.")] = 300
    pictures: Annotated[int, Opt("Pictures for each protocol.")] = 200
    generated: Annotated[int, Opt("Pictures of shapes-sd3, eight a prompt.")] = 240
    seed: Annotated[int, Opt("Seed.")] = 1

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> Any:
        from diffalign.bench.judging import JudgeBench

        names = ("judge", "questions", "edits", "passes", "choices", "candidates", "pairs", "pictures", "generated")
        return JudgeBench(seed=self.seed, **{name: getattr(self, name) for name in names})

    def run(self) -> dict[str, Any]:
        from diffalign.bench import judging
        from diffalign.cli.bench_said import said
        from diffalign.cli.model import quiet_libraries

        quiet_libraries()
        with said() as on_step:
            found = judging.measure(self.config(), on_step=on_step)
        for line in lines(found):
            print(line)
        return found


@dataclass(frozen=True, kw_only=True)
class Server(Verb):
    """How many questions a second a judge's server answers: several at once over one at a time, and a repeated run.

    Every number of requests at once is timed in turn, --rounds times; gains are over one at a time, with intervals over
    rounds. The repeated run goes through the request cache and should make no request.

    \b
    diffalign bench server http://127.0.0.1:8000/v1
    diffalign bench server http://127.0.0.1:8000/v1#my-model --no-pictures --json server.json
    """

    NAME: ClassVar[str] = "server"
    url: Annotated[str, Opt("Address of the server, with #model where it has several.", positional=True)]
    questions: Annotated[int, Opt("Questions in one measurement.")] = 32
    rounds: Annotated[int, Opt("Measurements of each kind.")] = 5
    tokens: Annotated[int, Opt("Tokens of a reply at most.")] = 32
    pictures: Annotated[bool, Opt("Whether questions show a picture.")] = True

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> Any:
        from diffalign.bench.judge_server import JudgeServerBench

        names = ("questions", "rounds", "tokens", "pictures", "seed")
        return JudgeServerBench(**{name: getattr(self, name) for name in names})

    def run(self) -> dict[str, Any]:
        from diffalign.bench import judge_server
        from diffalign.cli.bench_said import said

        url, _, model = self.url.partition("#")
        with said() as on_step:
            found = judge_server.measure(url, self.config(), on_step=on_step, **({"model": model} if model else {}))
        for line in lines(found):
            print(line)
        return found


def lines(found: Any, path: str = "") -> list[str]:
    """Every figure on a line of its own, intervals in brackets."""
    if isinstance(found, dict) and {"mean", "lo", "hi"} <= set(found):
        return ["{}: {mean:.3f} [{lo:.3f}, {hi:.3f}]".format(path, **found)]
    if isinstance(found, dict):
        return [line for name, value in found.items() for line in lines(value, f"{path} / {name}" if path else name)]
    return [f"{path}: {found:.3f}" if isinstance(found, float) else f"{path}: {found}"]
