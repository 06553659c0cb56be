"""A judge in this process: any image-text-to-text model of transformers with its processor and chat template."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.judges.asking import Decision, Question, Reply
from diffalign.judges.batching import Refused, answers, require_few
from diffalign.judges.endpoint_forms import COVERED
from diffalign.judges.forking import Shared, renewed_in_forks
from diffalign.judges.opening import find_folder, open_model, open_processor, version_of
from diffalign.judges.sampling import Draws, Forced, shares
from diffalign.vision import to_pil

Found = TypeVar("Found")
NOT_FINITE = "a picture holds NaN or infinity"
PROBE = 224  # side of a picture that every processor takes


class LocalJudge(Shared):
    """`model` is a folder or hub id, loaded at first use; a question has the same answer alone and in a batch.

    Pictures of more than `pixels` are made smaller first; `processor` holds further settings of the model's own
    processor, such as `crop_to_patches`. `adapter` is a LoRA folder or hub id that is merged in. A decision whose
    labels together have less than the probability `covered` is none.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,  # None: where the pictures are
        batch: int = 8,  # questions at once; memory grows with it
        pixels: int | None = None,  # of a picture at most
        most_images: int = 8,  # in one question
        covered: float = COVERED,
        processor: Mapping[str, Any] | None = None,
    ) -> None:
        self._settings = {name: value for name, value in locals().items() if name != "self"}
        for name, value in (("batch", batch), ("pixels", pixels), ("most_images", most_images)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} of the judge '{model}' is {value!r}. Give a whole number of 1 or more.")
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ConfigError(f"dtype of the judge '{model}' is {dtype!r}. Give auto, float32, bfloat16 or float16.")
        if not 0 <= covered <= 1:
            raise ConfigError(f"covered of the judge '{model}' is {covered!r}. Give a probability from 0 to 1.")
        self.model, self.revision, self.adapter, self.dtype = str(model), revision, adapter, dtype
        self.device, self.batch, self.pixels, self.most_images = device, batch, pixels, most_images
        self.name, self.covered, self.processing = Path(self.model).name, covered, dict(processor or {})
        self._renew()
        renewed_in_forks(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @property
    def options(self) -> dict[str, Any]:
        """What makes one judge of these weights another."""
        found = {"dtype": self.dtype, "pixels": self.pixels, "covered": self.covered, "processor": self.processing}
        return {name: value for name, value in found.items() if value is not None}

    @cached_property  # of what is loaded: a folder that changes later does not change it
    def version(self) -> str:
        """What tells this model from others."""
        with self._lock:
            found = [version_of(self._folder, self.model)]
            if self.adapter is not None and self._adapter is not None:
                found.append(version_of(self._adapter, self.adapter))
            return " ".join(found)

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        """One text per question; one that did not end within `max_tokens`, or what the model reads, has a problem."""

        def alike(k: int) -> Any:
            return len(questions[k].images), questions[k].max_tokens

        def answer(rows: list[int]) -> list[Reply]:
            return self._replies([questions[k] for k in rows])

        return self._in_parts(questions, alike, answer, lambda problem: Reply(problem=problem))

    def decide(self, decisions: Sequence[Decision], *, whole: bool = False) -> list[tuple[float, ...] | None]:
        """The probability that the reply begins with each label, of all labels, or of all words if `whole`.

        None where the judge would say something else.
        """
        with self._lock:
            starts = {labels: self._starts(labels) for labels in dict.fromkeys(one.labels for one in decisions)}
        questions = [Question(text=one.prompt, images=one.images, max_tokens=1) for one in decisions]

        def answer(rows: list[int]) -> list[tuple[float, ...] | None]:
            logits = self._next([questions[k] for k in rows])
            least = None if whole else self.covered
            return [shares(row, starts[decisions[k].labels], least) for k, row in zip(rows, logits, strict=True)]

        return self._in_parts(questions, lambda k: len(questions[k].images), answer, lambda _: None)

    def likelihood(self, images: Sequence[Tensor], text: str, answer: str) -> float:
        """exp of minus the mean cross entropy of the answer's tokens: their probabilities' geometric mean."""
        return self.likelihoods([Question(text=text, images=tuple(images))], [answer])[0]

    def likelihoods(self, questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
        """`likelihood` of one answer per question."""
        with self._lock:
            ids = [self._ids(answer) for _, answer in zip(questions, answers, strict=True)]
        if not all(ids):
            raise ConfigError("an answer is empty, so it has no likelihood. Give a word such as 'Yes'.")

        def answer(rows: list[int]) -> list[float]:
            return self._likelihoods([questions[k] for k in rows], [ids[k] for k in rows])

        return self._in_parts(questions, lambda k: (len(questions[k].images), len(ids[k])), answer, lambda _: math.nan)

    def read(self, questions: Sequence[Question]) -> tuple[Any, dict[str, Any]]:
        """The model and what it reads of questions, for whoever needs more of it than words."""
        return self._module, self._inputs(questions)

    def _in_parts(
        self,
        questions: Sequence[Question],
        alike: Callable[[int], Any],
        answer: Callable[[list[int]], list[Found]],
        otherwise: Callable[[str], Found],
    ) -> list[Found]:
        """The answers in order, found for up to `batch` alike rows at once; `otherwise` has the problem of a row."""
        for question in questions:
            require_few(question.images, self.name, self.most_images)
        found = [otherwise(NOT_FINITE)] * len(questions)
        sound = [k for k, q in enumerate(questions) if all(bool(image.isfinite().all()) for image in q.images)]
        with self._lock, torch.inference_mode():
            for k, value in answers(sound, alike, self.batch, answer, otherwise):
                found[k] = value
        return found

    def _replies(self, questions: Sequence[Question]) -> list[Reply]:
        inputs = self._inputs(questions, more=1)
        draws, most = Draws(questions), questions[0].max_tokens
        room = self._limit - int(inputs["attention_mask"].sum(1).max())
        if room < most and len(questions) > 1:
            raise Refused(f"one question leaves room for {room} tokens")
        most = min(most, int(room)) if math.isfinite(room) else most
        told = self._module.generate(**inputs, max_new_tokens=most, logits_processor=[draws])
        replies = []
        for ids, broken in zip(told[:, inputs["input_ids"].shape[1] :].tolist(), draws.broken, strict=True):
            end = next((k for k, token in enumerate(ids) if token in self._ends), None)
            problem = "the model gave NaN" if broken else f"cut off after {most} tokens" if end is None else ""
            text = "" if broken else self._processor.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            replies.append(Reply(text=text, problem=problem or ("" if text else "the reply is empty")))
        return replies

    def _next(self, questions: Sequence[Question]) -> list[Tensor]:
        """The logits (V,) of the first token of each reply."""
        logits = self._module.generate(
            **self._inputs(questions), max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        ).logits[0]
        return list(logits.double().cpu())

    def _likelihoods(self, questions: Sequence[Question], ids: Sequence[Sequence[int]]) -> list[float]:
        inputs = self._inputs(questions, more=len(ids[0]))
        said = torch.tensor(ids, device=inputs["input_ids"].device)  # (B, N)
        told = self._module.generate(
            **inputs,
            max_new_tokens=said.shape[1],
            logits_processor=[Forced(said, inputs["input_ids"].shape[1])],
            output_logits=True,
            return_dict_in_generate=True,
        )
        spread = torch.stack(told.logits, 1).double().log_softmax(-1)  # (B, N, V)
        each = spread.gather(-1, said[..., None])[..., 0]
        return [float(value) for value in each.mean(1).exp()]

    def _inputs(self, questions: Sequence[Question], more: int = 0) -> dict[str, Any]:
        """What the model reads, on its device, with room for `more` tokens."""
        prompts = [self._prompt(question) for question in questions]
        images = [[self._picture(image) for image in q.images] for q in questions]
        try:
            found = self._processed(prompts, images)
        except Exception as e:
            sizes = ", ".join(f"{p.width}x{p.height}" for row in images for p in row)
            told = f"the processor of '{self.model}' refuses pictures of {sizes}: {e}."
            raise (Refused(told) if self._takes_plain(len(images[0])) else ConfigError(told)) from e
        device = self.device or next((q.images[0].device for q in questions if q.images), self._module.device)
        self._module.to(device)
        longest, limit = int(found["attention_mask"].sum(1).max()), self._limit
        if longest + more > limit:
            raise Refused(
                f"the question is {longest} tokens long, and '{self.model}' reads {limit} with its reply: use fewer "
                "words, fewer pictures, or smaller ones with `pixels`"
            )
        return dict(found.to(device, self._module.dtype))

    def _prompt(self, question: Question) -> str:
        render, chat = self._processor.apply_chat_template, self._chat(question)
        try:
            found: str = render(chat, tokenize=False, add_generation_prompt=True)
        except Exception as e:
            hint = " It may have no room for a system prompt." if question.system else ""
            raise ConfigError(f"the chat template of '{self.model}' refuses the question: {e}.{hint}") from e
        return found

    def _processed(self, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
        start = self._processor.tokenizer.bos_token
        begun = {"add_special_tokens": False} if start and prompts[0].startswith(start) else {}
        given = {"images": images} if images[0] else {}
        settings = {"padding": True, "return_tensors": "pt", **begun, **self.processing}
        return self._processor(text=prompts, **given, **settings)

    def _takes_plain(self, count: int) -> bool:
        """Whether the processor takes plain pictures, so that those it refused are at fault and no setting is."""
        image = torch.full((3, PROBE, PROBE), 0.5)
        plain = Question(text="?", images=(image,) * count)
        try:
            self._processed([self._prompt(plain)], [[self._picture(image)] * count])
        except Exception:
            return False
        return count > 0

    def _chat(self, question: Question) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        if question.system:
            told.append({"role": "system", "content": [{"type": "text", "text": self._plain(question.system)}]})
        parts: list[dict[str, str]] = [{"type": "image"} for _ in question.images]
        return [*told, {"role": "user", "content": [*parts, {"type": "text", "text": self._plain(question.text)}]}]

    def _plain(self, text: str) -> str:
        """The text with every control token broken up, so that a prompt cannot end its turn or add a picture."""
        text = text.encode("utf-8", "replace").decode()
        for token in self._controls:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _picture(self, image: Tensor) -> Any:
        from PIL import Image

        made = to_pil(image[None])[0]
        if self.pixels is None or made.width * made.height <= self.pixels:
            return made
        shrink = math.sqrt(self.pixels / (made.width * made.height))
        size = max(1, math.floor(made.width * shrink)), max(1, math.floor(made.height * shrink))
        return made.resize(size, Image.Resampling.BICUBIC)

    def _ids(self, words: str) -> list[int]:
        found: list[int] = self._processor.tokenizer(words, add_special_tokens=False)["input_ids"]
        return found

    def _starts(self, labels: tuple[str, ...]) -> list[list[int]]:
        """The tokens that each label may begin with, alone or after a space."""
        found = []
        for label in labels:
            spaced = [ids[:1] for ids in (self._ids(label), self._ids(f" {label}")) if ids]
            found.append(sorted({i for ids in spaced for i in ids if self._processor.tokenizer.decode(ids).strip()}))
        every = [token for starts in found for token in starts]
        if len(labels) < 2 or len(every) != len(set(every)) or not all(found):
            raise ConfigError(
                f"the labels {', '.join(map(repr, labels))} do not differ in their first token for '{self.name}', so "
                "one look does not tell them apart. Use labels such as A, B and C."
            )
        return found

    @cached_property
    def _folder(self) -> Path:
        return find_folder(self.model, self.revision)

    @cached_property
    def _adapter(self) -> Path | None:
        return None if self.adapter is None else find_folder(self.adapter)

    @cached_property
    def _processor(self) -> Any:
        return open_processor(self._folder)

    @cached_property
    def _module(self) -> Any:
        _ = self._processor, self.version
        return open_model(self._folder, self._adapter, self.dtype)

    @cached_property
    def _ends(self) -> set[int]:
        own = self._module.generation_config.eos_token_id
        found = own if isinstance(own, list) else [self._processor.tokenizer.eos_token_id if own is None else own]
        return {token for token in found if token is not None}

    @cached_property
    def _limit(self) -> float:
        told = getattr(self._module.config, "text_config", self._module.config)
        return getattr(told, "max_position_embeddings", None) or math.inf

    @cached_property
    def _controls(self) -> list[str]:
        words = self._processor.tokenizer
        added = [str(token) for token in words.added_tokens_decoder.values() if token.special]
        return sorted({t for t in [*words.all_special_tokens, *added] if len(t) > 1 and t.strip()}, key=len)[::-1]
