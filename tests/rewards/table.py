"""The table of docs/rewards.md, made from the cards: `python -m tests.rewards.table` writes it."""

from __future__ import annotations

from pathlib import Path

from diffalign.registry import Card, cards

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD = ("reward", "a score is", "range; typical", "gradient", "cost of one image", "memory", "proven", "what it misses")


def table() -> str:
    """One row a reward, by name."""
    rows = [HEAD, ("---",) * len(HEAD), *(_row(name, card) for name, card in sorted(cards().items()))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page_with(content: str, rows: str) -> str:
    """The page with the table between its marks."""
    before, rest = content.split(BEGIN)
    return f"{before}{BEGIN}\n\n{rows}\n\n{END}{rest.split(END)[1]}"


def _row(name: str, card: Card) -> tuple[str, ...]:
    scale = _ends(card.range) if card.range else "unbounded"
    typical = f"; {_ends(card.typical)}" if card.typical else ""
    judged = "" if card.modality == "image" else f" ({card.modality})"
    cells = (card.meaning, scale + typical, "yes" if card.differentiable else "no", card.cost, card.memory, card.proof)
    return (f"`{name}`{judged}", *(cell.replace("|", "\\|") for cell in (*cells, card.misses)))


def _ends(pair: tuple[float, float]) -> str:
    return " to ".join(f"{end:g}" for end in pair)


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
