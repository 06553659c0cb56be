"""Base of the drop-in pipelines: a stock pipeline's class and components, with one more way to call it."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffalign import registry
from diffalign.cases import as_prompts
from diffalign.errors import ConfigError, HubError, ModelError, UnknownName

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from diffalign.budget import Budget

EMBEDDED = "shapes-sd3"  # what an unreachable hub id is answered with


class Shell:
    """Mixed in front of a stock pipeline class: `isinstance` holds, components are shared, only `__call__` grows."""

    ADVANCED: ClassVar[tuple[str, ...]] = ()  # further keywords of the shell's call, taken from its **kwargs
    stock_class: ClassVar[type] = object  # the pipeline class behind the shell; set by `from_pipe`
    report: Any = None  # of the last call that searched; also on the output when it is not a tuple

    @classmethod
    def from_pretrained(cls, id_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a stock pipeline from a hub id, a folder or an embedded model's name, and wrap it."""
        return cls.from_pipe(load_pipeline(id_or_path, **kwargs))

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **components: Any) -> Self:
        """Wrap a loaded pipeline; both share their components, and a shell is unwrapped first, never stacked."""
        if not hasattr(pipe, "components") or not callable(pipe):
            raise ConfigError(f"from_pipe takes a diffusers pipeline, but got {type(pipe).__name__}.")
        made: Any = _shell_of(cls)
        kind = shelled(made, stock_class(pipe))
        shell: Self = object.__new__(kind)
        shell.__dict__.update({k: v for k, v in pipe.__dict__.items() if k != "report"})
        for name, component in components.items():
            if name not in pipe.components:
                known = ", ".join(sorted(pipe.components))
                raise ConfigError(f"{stock_class(pipe).__name__} has no component '{name}'. It has: {known}.")
            setattr(shell, name, component)
        return shell

    def stock(self) -> DiffusionPipeline:
        """The plain pipeline again, with the same components."""
        plain: Any = object.__new__(self.stock_class)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != "report"})
        return plain

    def call_stock(self, *args: Any, **kwargs: Any) -> Any:
        """The stock call on this very object, so callbacks, hooks and offloading see what they always saw."""
        asked = {**kwargs, "prompt": as_prompts(kwargs["prompt"])} if "prompt" in kwargs else kwargs
        return self.stock_class.__call__(self, *(as_prompts(given) for given in args), **asked)

    def render(self, arguments: dict[str, Any], budget: Budget) -> tuple[Any, Tensor]:
        """One metered stock call: its output, and the pixels (R, [F,] 3, H, W) in [0, 1] that a reward looks at."""
        from diffalign import drive, media
        from diffalign.metering import metered

        asked = self._output_type(arguments)
        latents = media.LastLatents(arguments) if asked == "latent" else None
        changes = latents.arguments if latents else {"output_type": "pt"} if asked else {}
        with metered(self, budget):
            output = self.call_stock(**arguments | changes)
        fields, key = media.open_output(output)
        if latents:
            with drive.Driver(self, budget=budget, **arguments) as driver:
                pixels = driver.decode(latents.found(stock_class(self).__name__))
        else:
            pixels = media.to_tensor(fields[key])
            budget.charge(decodes=len(pixels))
        media.require_finite(pixels, stock_class(self).__name__)
        return output, pixels

    def as_asked(self, found: Any, arguments: dict[str, Any]) -> Any:
        """Rows that `render` gave, in the output type the caller asked for."""
        from diffalign import media

        asked = self._output_type(arguments)
        return found if asked in (None, "latent") else media.convert(media.to_tensor(found), asked)

    def _output_type(self, arguments: dict[str, Any]) -> str | None:
        """What the caller wants to hold; None for a pipeline that leaves no choice."""
        known = inspect.signature(self.stock_class.__call__).parameters.get("output_type")
        asked = arguments.get("output_type", known.default) if known else None
        if asked not in (None, "pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type is '{asked}', but images come as 'pil', 'np', 'pt' or 'latent'.")
        return asked

    @contextmanager
    def one_bar(self, total: int | None) -> Iterator[Any]:
        """One bar over candidates, set up as the user's `set_progress_bar_config` says; inner bars are silent."""
        from tqdm.auto import tqdm

        chosen = getattr(self, "_progress_bar_config", {})
        with tqdm(total=total, **{"desc": "candidates", **chosen}) as bar:
            self._progress_bar_config = {**chosen, "disable": True}
            try:
                yield bar
            finally:
                self._progress_bar_config = chosen


def stock_class(pipe: Any) -> type:
    """The pipeline class a user knows, also for a shell."""
    return pipe.stock_class if isinstance(pipe, Shell) else type(pipe)


@functools.cache
def shelled(shell: Any, stock: type) -> Any:
    """The class `(shell, stock)`; it keeps the stock name, which is what diffusers writes into model_index.json."""
    body = {"__module__": shell.__module__, "__qualname__": f"{shell.__name__}[{stock.__name__}]", "stock_class": stock}
    body["__call__"] = _documented(shell, stock)
    return type(stock.__name__, (shell, stock), body)


def _documented(shell: type[Shell], stock: type) -> Any:
    """The shell's `__call__` under a signature that lists the stock parameters and then ours."""

    @functools.wraps(shell.__call__)
    def call(self: Shell, *args: Any, **kwargs: Any) -> Any:
        return shell.__call__(self, *args, **kwargs)

    theirs = list(inspect.signature(stock.__call__).parameters.values())
    ours = inspect.signature(shell.__call__).parameters.values()
    mine = [p for p in ours if p.kind is p.KEYWORD_ONLY]
    mine += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in shell.ADVANCED]
    at = len(theirs) - (theirs[-1].kind is inspect.Parameter.VAR_KEYWORD)
    call.__dict__["__signature__"] = inspect.Signature(theirs[:at] + mine + theirs[at:])
    return call


def _shell_of(cls: type[Shell]) -> type[Shell]:
    """The shell a class was made from: `from_pipe` on a made class wraps anew rather than twice."""
    if cls.stock_class is object:
        return cls
    return next(c for c in cls.__mro__ if issubclass(c, Shell) and c.stock_class is object)


def load_pipeline(id_or_path: str | os.PathLike[str], **kwargs: Any) -> DiffusionPipeline:
    """A stock pipeline from an embedded model's name, a folder, or a hub id."""
    from diffusers import DiffusionPipeline

    place = locate(id_or_path)
    try:
        return DiffusionPipeline.from_pretrained(place, **kwargs)
    except (OSError, ValueError, ConnectionError) as e:
        if Path(place).is_dir():
            raise ModelError(f"'{place}' does not load as a diffusers pipeline: {e}") from e
        raise HubError(_unreachable(str(id_or_path), e)) from e


def locate(id_or_path: str | os.PathLike[str]) -> str:
    """Where a model is: its folder if it is one here or ships with diffalign, else the hub id itself."""
    text = os.fspath(id_or_path)
    if Path(text).is_dir():
        if not (Path(text) / "model_index.json").is_file():
            raise ModelError(f"the folder '{text}' holds no model_index.json, so it is not a diffusers pipeline.")
        return text
    if Path(text).is_absolute() or text.startswith((".", "~")):
        raise ModelError(f"there is no folder '{text}'. Give a folder written by save_pretrained, or use '{EMBEDDED}'.")
    if "/" not in text:
        return _embedded(text)
    return text


def _embedded(name: str) -> str:
    """The folder of a model that ships with diffalign; a slip of the pen is answered with the nearest name."""
    try:
        return str(registry.embedded(name))
    except ModelError:
        models = Path(__file__).parent / "zoo" / "models"
        known = [folder.name for folder in models.iterdir()] if models.is_dir() else []
        if get_close_matches(name, known, n=1, cutoff=0.5):
            raise UnknownName.among("embedded model", name, known, "diffalign zoo list") from None
        raise


def _unreachable(name: str, error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    why = text if len(text) <= 160 else f"{text[:157]}..."
    return (
        f"cannot fetch '{name}' from the Hugging Face Hub ({why}). If there is no network here, give a local folder "
        f"or use the embedded model '{EMBEDDED}'; if the id is private, log in with `hf auth login`."
    )
