"""The tokenizer of `shapes-vlm`: byte pairs of its lessons, and one token for each sentence it is always asked with."""

from __future__ import annotations

import random
import re
from typing import Any

from diffalign.judges import wording
from diffalign.judges.wording import options
from diffalign.zoo.curriculum import LONG, SHORT, draw

PAD, END, USER, SYSTEM, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"
IMAGE, START_IMAGE, END_IMAGE, VIDEO = "<|image|>", "<|image_start|>", "<|image_end|>", "<|video|>"
SPECIALS = (PAD, END, USER, SYSTEM, ASSISTANT, IMAGE, START_IMAGE, END_IMAGE, VIDEO)
TEMPLATE = (
    "{%- for message in messages -%}<|{{ message['role'] }}|>"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}<|image|>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
PIECES = 640  # byte pairs, the 256 bytes included
SHORTEST = 9  # characters of a sentence that is worth a token
REPLIES = (  # what stands between the parts of a reply
    '{"reasoning": "',
    '", "score": [',
    '", "checks": [',
    '], "score": ',
    '[{"question": "',
    '"}, {"question": "',
    '", "must": true}',
    '", "must": false}',
    ', {"question": "',
    '", "category": "',
    '[{"evidence": "',
    '", "answer": "',
    '"}, {"evidence": "',
    '[{"criterion": "',
    '}, {"criterion": "',
    '", "evidence": "',
    '", "status": "',
    '", "severity": ',
    '{"scores": {"',
    '}, "best-to-worst": ["',
    "Final Score: ",
    "Alignment Score: ",
    "Coherence Score: ",
    "Style Score: ",
    "before: ",
    "; after: ",
    "; asked: ",
    "; rest: ",
)


def sentences() -> list[str]:
    """The parts of the judges' templates that never change."""
    templates = [value for name, value in vars(wording).items() if name.isupper() and isinstance(value, str)]
    levels = options("", tuple("ABCDE"), wording.LEVELS)
    found = [levels.rpartition("\n")[0] + "\n", levels.rpartition("\n")[2], "Answer Yes or No.", "Answer A or B."]
    found.append(options("", ("A", "B"), (wording.FIRST, wording.SECOND)).rpartition("\n")[0] + "\n")
    for template in templates:
        parts = re.split(r"(?<!\{)\{\w+\}(?!\})", template)
        found += [part.replace("{{", "{").replace("}}", "}") for part in parts]
    found += ["Answer Yes or No only.", "Answer with a number.", "Are there exactly "]
    found.append("Answer with the letter of the level that fits best (A to E) only.")
    found.append("Answer with the letter of the option that fits best (A to B) only.")
    return [part for part in dict.fromkeys([*found, *REPLIES]) if len(part) >= SHORTEST]


def tokenizer(seed: int = 0, lessons: int = 6000) -> Any:
    """A fast tokenizer, made from the lessons alone."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    words = Regex(r"\d| ?[A-Za-z]+|\s+| ?[^\sA-Za-z\d]+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_corpus(seed, lessons), trainer)
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    made.add_tokens([AddedToken(text, normalized=False, special=False) for text in sentences()])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "start_image_token": START_IMAGE,
            "end_image_token": END_IMAGE,
            "context_image_token": IMAGE,
            "video_token": VIDEO,
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    found.chat_template = TEMPLATE
    return found


def _corpus(seed: int, lessons: int) -> list[str]:
    """Questions and answers without the sentences that have tokens of their own."""
    rng = random.Random(seed)
    known = re.compile("|".join(re.escape(text) for text in sorted(sentences(), key=len, reverse=True)))
    texts = []
    for k in range(lessons):
        lesson = draw(SHORT if k % 2 else LONG, rng)
        texts += known.split(lesson.question) + known.split(lesson.answer)
    return [text for text in texts if text]
