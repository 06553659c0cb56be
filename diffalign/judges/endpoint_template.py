"""The template that lets `transformers serve` put typed decisions in our words, as a judge in this process hears them.

A model's folder may hold it as `decision_template.jinja`; without one the server words the question itself, and a judge
that learnt our words is asked in ones it does not know.
"""

from __future__ import annotations

FILE = "decision_template.jinja"
_TEXT = """\
{%- set text = question.instructions if question.instructions is not none else state -%}
{%- set lines = namespace(all=[text]) -%}
{%- for label in question.labels -%}
{%- set option, meaning = question.options[loop.index0], question.descriptions[loop.index0] -%}
{%- set named = question.type == "choice" and option != label -%}
{%- set told = (option ~ ": " ~ meaning if meaning else option) if named else meaning -%}
{%- set lines.all = lines.all + ([label ~ ". " ~ told] if told else []) -%}
{%- endfor -%}
{%- set two = "Answer " ~ question.labels[0] ~ " or " ~ question.labels[1:] | first ~ "." -%}
{%- set many = "Answer with one of " ~ question.labels | join(", ") ~ "." -%}
{{- (lines.all + [two if question.labels | length == 2 else many]) | join("\\n") -}}"""


def decision_template(before: str, picture: str, after: str) -> str:
    """The template of a model whose chat template writes `before` a user's turn, for each picture, and `after` it."""
    pictures = "{%- if state is not string %}{% for part in state %}" + _said(picture) + "{% endfor %}{% endif -%}"
    return f"{_said(before)}{pictures}{_TEXT}{_said(after)}"


def _said(text: str) -> str:
    """A Jinja expression that prints a text as it is."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '{{- "' + quoted + '" -}}'
