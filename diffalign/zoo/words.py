"""The tokenizer of the shapes models: one token per word of the grammar, in a stock CLIPTokenizer."""

from __future__ import annotations

from graphlib import TopologicalSorter
from itertools import pairwise
from typing import Any

from diffalign.world.grammar import words

LENGTH = 20  # tokens, start and end included: the longest prompt of the grammar fits
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"

Merge = tuple[str, str]


def tokenizer() -> Any:
    """A CLIPTokenizer whose merges spell every word of the grammar; other words fall to letters or `<|unknown|>`."""
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary()
    specials = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, **specials)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and byte-pair merges that build each word letter by letter; specials first, words next, pieces last."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words()}
    merges = list(TopologicalSorter(_precedence(list(spelled.values()))).static_order())
    pieces = {piece for word, letters in spelled.items() for piece in (*word, *letters)} | {a + b for a, b in merges}
    order = [START, END, UNKNOWN, *(word + "</w>" for word in spelled), *sorted(pieces)]
    return {token: i for i, token in enumerate(dict.fromkeys(order))}, merges


def _precedence(spelled: list[list[str]]) -> dict[Merge, list[Merge]]:
    """Which merges must rank above which, so that every word grows from its first letter and never from its middle."""
    grown = [[("".join(w[:k]), w[k]) for k in range(1, len(w))] for w in spelled]
    above: dict[Merge, list[Merge]] = {merge: [] for steps in grown for merge in steps}
    for word, steps in zip(spelled, grown, strict=True):
        for k, step in enumerate(steps):
            for rival in pairwise(word[k + 1 :]):
                if rival in above:
                    above[rival].append(step)
    return above


def known() -> int:
    """How many ids are specials or words; the ids from here on are word pieces."""
    return 3 + len(words())
