"""A contact sheet: each prompt with its pictures side by side, the verifier's mark and the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, CELL_GAP, MARGIN, WIDEST = 168, 8, 36, 40, 8  # WIDEST pictures in a row
PAPER, INK, SOFT, LINE = "#fbfaf7", "#1c1c1e", "#75757a", "#d9d7d0"
RIGHT, WRONG = "#1b7f4c", "#c2382c"
PROMPT_LINES = 2


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What one method made of a prompt."""

    image: Image.Image
    passed: bool | None = None  # the verifier's word; None where there is no verifier
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One prompt and a picture by each method."""

    prompt: str
    pictures: Sequence[Picture]


def contact_sheet(entries: Sequence[Entry], *, title: str, subtitle: str, labels: Sequence[str]) -> Image.Image:
    """All entries in a grid under a title; `labels` name the pictures of each."""
    columns = max(1, min(WIDEST // len(labels), len(entries)))
    rows = -(-len(entries) // columns)
    cell_width, cell_height = len(labels) * (SIDE + GAP) - GAP, 44 + SIDE + 30
    width = max(2 * MARGIN + columns * cell_width + (columns - 1) * CELL_GAP, 760)
    told = _wrapped(ImageDraw.Draw(Image.new("RGB", (1, 1))), subtitle, _font(15), width - 2 * MARGIN)
    head = MARGIN + 58 + 20 * len(told)
    sheet = Image.new("RGB", (width, head + rows * (cell_height + 22) + MARGIN - 12), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), title, font=_font(26), fill=INK)
    for k, line in enumerate(told):
        draw.text((MARGIN, MARGIN + 28 + 20 * k), line, font=_font(15), fill=SOFT)
    draw.line([(MARGIN, head - 18), (width - MARGIN, head - 18)], fill=LINE, width=1)
    for number, entry in enumerate(entries):
        left = MARGIN + (number % columns) * (cell_width + CELL_GAP)
        top = head + (number // columns) * (cell_height + 22)
        _draw_entry(sheet, draw, entry, left, top, labels)
    return sheet


def _draw_entry(sheet: Image.Image, draw: Any, entry: Entry, left: int, top: int, labels: Sequence[str]) -> None:
    lines = _wrapped(draw, entry.prompt, _font(15), len(labels) * (SIDE + GAP) - GAP)
    for k, line in enumerate(lines):
        draw.text((left, top + 19 * (k + PROMPT_LINES - len(lines))), line, font=_font(15), fill=INK)
    for k, (picture, label) in enumerate(zip(entry.pictures, labels, strict=True)):
        x, y = left + k * (SIDE + GAP), top + 44
        sheet.paste(_fitted(picture.image), (x, y))
        draw.rectangle([x - 1, y - 1, x + SIDE, y + SIDE], outline=LINE)
        if picture.passed is not None:
            _draw_mark(sheet, x + SIDE - 30, y + 6, picture.passed)
        draw.text((x, y + SIDE + 7), label, font=_font(13), fill=SOFT)
        if picture.score is not None:
            draw.text((x + SIDE, y + SIDE + 7), f"{picture.score:.3f}", font=_font(13), fill=INK, anchor="ra")


def _draw_mark(sheet: Image.Image, x: int, y: int, passed: bool) -> None:
    """A tick or a cross on a disc, drawn large and shrunk so that its edges are smooth."""
    big = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    draw = ImageDraw.Draw(big)
    draw.ellipse([2, 2, 93, 93], fill=RIGHT if passed else WRONG, outline="white", width=5)
    if passed:
        draw.line([(27, 50), (42, 65), (70, 33)], fill="white", width=10, joint="curve")
    else:
        draw.line([(33, 33), (63, 63)], fill="white", width=10)
        draw.line([(63, 33), (33, 63)], fill="white", width=10)
    small = big.resize((24, 24), Image.Resampling.LANCZOS)
    sheet.paste(small, (x, y), small)


def _fitted(image: Image.Image) -> Image.Image:
    """The picture on a square of our size, unstretched; tiny ones are enlarged smoothly."""
    scale = SIDE / max(image.size)
    shown = image.convert("RGB").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    square.paste(shown, ((SIDE - shown.width) // 2, (SIDE - shown.height) // 2))
    return square


def _wrapped(draw: Any, text: str, font: Any, width: int) -> list[str]:
    """At most two lines that fit; the rest becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > PROMPT_LINES:
        lines = [*lines[: PROMPT_LINES - 1], f"{lines[PROMPT_LINES - 1]} ..."]
    return [_cut(draw, line, font, width) for line in lines]


def _cut(draw: Any, line: str, font: Any, width: int) -> str:
    while draw.textlength(line, font=font) > width and len(line) > 4:
        line = line.removesuffix("...")[:-1] + "..."
    return line


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
