"""With our template in its folder, a server puts a typed decision exactly as a judge in this process hears it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.judges import endpoint_forms as forms
from diffalign.judges.asking import Decision, Question
from diffalign.judges.endpoint_template import FILE, decision_template
from diffalign.judges.local import LocalJudge
from tests.judges import tiny_judges

TEMPLATE = decision_template("<|im_start|>user\n", "<IMG_CONTEXT>\n", "<|im_end|>\n<|im_start|>assistant\n")
PICTURE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
DECISIONS = {
    "yes or no": Decision(text='Does it show "a {{ red }} {% circle %}"?', images=(PICTURE,)),
    "yes or no, described": Decision(text="Is it?", images=(PICTURE,), described=("it is", "it is not")),
    "without pictures": Decision(text="Is red a colour?"),
    "two pictures": Decision(text="Which?", images=(PICTURE,) * 2, labels=("A", "B"), described=("this", "that")),
    "choice of letters": Decision(text="Which?", images=(PICTURE,), labels=("A", "B", "C")),
    "levels": Decision(text="How well?", images=(PICTURE,), labels=tuple("ABC"), described=tuple("xyz"), ordered=True),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_judges.folder(tmp_path_factory.mktemp("template") / "judge")
    (folder / FILE).write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", DECISIONS)
def test_the_model_reads_the_same_tokens_on_a_server_and_here(served: Path, name: str) -> None:
    from transformers import AutoProcessor

    config = pytest.importorskip("transformers.decision").DecisionConfig
    decision = DECISIONS[name]
    processor = AutoProcessor.from_pretrained(served)
    body = forms.typed("m", decision, [forms.picture(image, None) for image in decision.images])
    ((inputs, asked),) = config.from_pretrained(served).prepare_inputs(body, processor)
    here = LocalJudge(str(served))._inputs([Question(text=decision.prompt, images=decision.images)])
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == processor.tokenizer.decode(here["input_ids"][0])
    assert inputs["input_ids"].tolist() == here["input_ids"].tolist()
    assert tuple(asked[0].labels) == decision.labels
