"""Where a judge's server is and how it is asked, checked before anything is sent; and what a server refuses."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from diffalign.errors import ConfigError

KEYS = ("DIFFALIGN_JUDGE_KEY", "OPENAI_API_KEY")  # variables that may hold the key, the first one wins
EXAMPLE = "Give the address of a server, such as http://127.0.0.1:8000/v1#model."
WAYS = ("logprobs", "systemone")  # where decisions come from, the better one first
HOWS = ("auto", *WAYS)
GUESSED = ("generation_config", "top_k", "response_format", "seed")  # fields a server may not know, oddest first
NAMED = ("top_p", "temperature", "max_tokens")  # fields that are left out only if the server names them
OTHERWISE = {"max_tokens": "max_completion_tokens"}  # what a field is called elsewhere


@dataclass(frozen=True)
class Address:
    """A server, which of its models, and the key it asks for."""

    url: str
    model: str | None
    key: str = field(repr=False)


def find_address(url: str, model: str | None, key: str | None) -> Address:
    """The parts of `http://host:port/v1#model`; the key is the one given, or of the environment, or none."""
    if not isinstance(url, str):
        raise ConfigError(f"the judge's url is {url!r}. {EXAMPLE}")
    plain, _, named = url.strip().partition("#")
    try:
        parts = urlsplit(plain)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or re.search(r"[\s\x00-\x1f]", plain):
        raise ConfigError(f"the judge's url is {_hidden(plain)!r}, which is no address of a server. {EXAMPLE}")
    if "@" in parts.netloc or parts.query:
        raise ConfigError(
            f"the judge's url {_hidden(plain)!r} holds a name, password or query, which logs would show. Give the "
            f"address alone and the key in ${KEYS[0]}."
        )
    if model and named and model != named:
        raise ConfigError(f"the judge's url names the model '{named}', and `model` is '{model}'. Give one of them.")
    held = key if key is not None else next((os.environ[name] for name in KEYS if os.environ.get(name)), "none")
    held = held.strip() or "none"
    if not held.isascii() or not held.isprintable():
        raise ConfigError("the judge's key holds characters that no key has. Copy it again, without line breaks.")
    return Address(plain.rstrip("/"), model or named or None, held)


def check_settings(counts: Mapping[str, Any], timeout: Any, how: Any) -> None:
    """Refuse what is no count, no time and no way; `pixels` may be None."""
    for name, value in counts.items():
        least = 0 if name == "retries" else 1
        if (isinstance(value, bool) or not isinstance(value, int) or value < least) and (name, value) != (
            "pixels",
            None,
        ):
            raise ConfigError(f"{name} of the judge is {value!r}. Give a whole number of {least} or more.")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ConfigError(f"timeout of the judge is {timeout!r}. Give seconds, more than 0.")
    if how not in HOWS:
        raise ConfigError(f"how of the judge is {how!r}, but it is one of {', '.join(HOWS)}.")


class Refusals:
    """The fields of a request that a server refused: from then on they are left out or called otherwise."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def without(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body as the server takes it."""
        renamed = {OTHERWISE.get(k, "") if k in self.known else k: v for k, v in body.items()}
        return {k: v for k, v in renamed.items() if k}

    @staticmethod
    def suspect(problem: str, names: Iterable[str]) -> tuple[str | None, bool]:
        """The field of these that an error is about, and whether it names that one; else the oddest is taken."""
        here = [name for name in (*GUESSED, *NAMED) if name in set(names)]
        named = [name for name in here if re.search(rf"(?<![a-z_]){name}(?![a-z_])", problem)]
        return next(iter(named or [name for name in here if name in GUESSED]), None), bool(named)

    @staticmethod
    def changed(body: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The body without that field."""
        rest = {k: v for k, v in body.items() if k != name}
        return rest | ({OTHERWISE[name]: body[name]} if name in OTHERWISE and name in body else {})


def _hidden(url: str) -> str:
    """An address that may be shown."""
    return re.sub(r"\?.*", "?...", re.sub(r"//[^/@]*@", "//...@", url))
