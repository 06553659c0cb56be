"""Judges in this process, on tiny random models of real classes with their own processors and templates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.judges.asking import Decision, Question, Reply, ask
from diffalign.judges.local import LocalJudge
from diffalign.judges.sampling import Draws, kept, shares
from tests.judges import tiny_judges

Make = Callable[..., LocalJudge]
ABC = ("A", "B", "C")


def pictures(count: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 20 + 6 * k, 30, generator=rng) for k in range(count)]


def questions(count: int, **more: Any) -> list[Question]:
    seen = pictures(3)
    told: dict[str, Any] = {"max_tokens": 10, "temperature": 1.0, "top_p": 0.95} | more
    return [
        Question(text=f"What is it? {'So ' * k}", images=tuple(seen[: k % 3]), seed=k, **told) for k in range(count)
    ]


@pytest.mark.parametrize("kind", tiny_judges.KINDS)
def test_a_question_has_the_same_answer_alone_and_in_a_batch(kind: str, judge: Make) -> None:
    asked = questions(8)
    together = judge(kind).reply(asked)
    assert together == [judge(kind).reply([question])[0] for question in asked]
    assert together == judge(kind, batch=3).reply(asked)
    assert together[::-1] == judge(kind).reply(asked[::-1])
    assert len({reply.text for reply in together}) == len(asked)


@pytest.mark.parametrize("kind", tiny_judges.KINDS)
def test_a_decision_is_the_same_alone_and_in_a_batch_and_sums_to_one(kind: str, judge: Make) -> None:
    seen = pictures(4)
    asked = [Decision(text="Is it" + " so" * k, images=tuple(seen[: 1 + k % 2]), labels=ABC) for k in range(4)]
    found = judge(kind).decide(asked)
    for one, probabilities in zip(asked, found, strict=True):
        assert probabilities is not None
        assert sum(probabilities) == pytest.approx(1)
        assert judge(kind).decide([one])[0] == pytest.approx(probabilities, rel=1e-4)


@pytest.mark.parametrize("kind", tiny_judges.KINDS)
def test_the_picture_and_the_order_of_pictures_matter(kind: str, judge: Make) -> None:
    one, two = pictures(2)
    asked = [Decision(text="?", images=images) for images in ((one, two), (two, one), (one, one), ())]
    assert len({tuple(map(float, row or ())) for row in judge(kind).decide(asked)}) == 4


def test_probabilities_are_those_of_the_models_own_logits(judge: Make) -> None:
    backend, (image,) = judge(), pictures(1)
    asked = Decision(text="A red circle?", images=(image,))
    inputs = backend._inputs([Question(text=asked.prompt, images=(image,))])
    with torch.no_grad():
        spread = backend._module(**inputs).logits[0, -1].double().softmax(-1)
    words = backend._processor.tokenizer
    mass = [sum(spread[i] for i in {words(form)["input_ids"][0] for form in (t, f" {t}")}) for t in ("Yes", "No")]
    assert backend.decide([asked], whole=True)[0] == pytest.approx([float(m) for m in mass], rel=1e-4)
    assert backend.decide([asked])[0] == pytest.approx([float(m / sum(mass)) for m in mass], rel=1e-4)


@pytest.mark.parametrize("kind", tiny_judges.KINDS)
def test_likelihood_is_the_geometric_mean_of_the_answers_probabilities(kind: str, judge: Make) -> None:
    backend, (image,) = judge(kind), pictures(1)
    asked = Question(text="A red circle?", images=(image,))
    ids = backend._ids("Yes red circle")
    assert len(ids) > 2
    given, each = backend._inputs([asked]), []
    for token in ids:
        with torch.no_grad():
            each.append(backend._module(**given).logits[0, -1].double().log_softmax(-1)[token])
        given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([[token]])], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, 1))
    expected = float(torch.stack(each).mean().exp())
    assert backend.likelihood([image], asked.text, "Yes red circle") == pytest.approx(expected, rel=1e-4)
    both = backend.likelihoods([asked, asked, Question(text="A red circle?")], ["Yes red circle", "No", "No"])
    assert both[0] == pytest.approx(expected, rel=1e-4)
    assert all(0 < value < 1 for value in both)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 20, 0.9), (1.5, 5, 1.0)])
def test_texts_are_drawn_with_the_probabilities_of_the_model(
    temperature: float, top_k: int, top_p: float, judge: Make
) -> None:
    count, told = 3000, {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    with torch.inference_mode():
        logits = judge()._next([Question(text="?")])[0]
    logits = logits.clone()
    draws = Draws([Question(text="?", seed=k, **told) for k in range(count)])
    seen = Counter(draws(torch.zeros(count, 1), logits.expand(count, -1)).argmax(1).tolist())
    expected = kept(logits / temperature, top_k, top_p).softmax(0)
    assert all(expected[token] > 0 for token in seen)
    likely = [k for k, p in enumerate(expected.tolist()) if p * count >= 5]
    spread = sum((seen[k] - count * expected[k].item()) ** 2 / (count * expected[k].item()) for k in likely)
    assert spread < len(likely) + 5 * math.sqrt(2 * len(likely))  # chi-square: its mean and five deviations


def test_the_first_word_of_a_sampled_reply_has_the_probability_that_decide_gives(judge: Make) -> None:
    wanted, count = judge().decide([Decision(text="?", labels=ABC)], whole=True)[0], 600
    prompt = Decision(text="?", labels=ABC).prompt
    asked = [Question(text=prompt, seed=k, temperature=1.0, max_tokens=1) for k in range(count)]
    said = Counter(reply.text for reply in judge(batch=100).reply(asked))
    assert wanted is not None
    for label, share in zip(ABC, wanted, strict=True):
        assert abs(said[label] / count - share) < 5 * math.sqrt(share * (1 - share) / count) + 1 / count


def test_top_k_and_top_p_keep_the_fewest_likeliest() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).double().log()
    for top_k, top_p, left in (
        (0, 1.0, 4),
        (2, 1.0, 2),
        (0, 0.39, 1),
        (0, 0.41, 2),
        (0, 0.69, 2),
        (0, 0.71, 3),
        (1, 0.9, 1),
    ):
        found = kept(logits, top_k, top_p).isfinite()
        assert found.sum() == left
        assert found[logits.argsort(descending=True)[:left]].all()


def test_a_cold_judge_says_the_likeliest_words_and_seeds_do_not_matter(judge: Make) -> None:
    cold = judge().reply([Question(text="?", max_tokens=8, seed=seed) for seed in (0, 1)])
    assert cold[0] == cold[1]
    one = judge().reply([Question(text="?", max_tokens=8, temperature=1.0, top_k=1, seed=3)])
    assert one[0] == cold[0]
    assert judge().reply(questions(1, temperature=1.0)) != judge().reply(
        [Question(text="What is it? ", seed=9, max_tokens=10, temperature=1.0)]
    )


def test_the_global_random_state_is_neither_read_nor_moved(judge: Make) -> None:
    torch.manual_seed(0)
    before, first = torch.random.get_rng_state(), judge().reply(questions(3))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    assert judge().reply(questions(3)) == first


def test_a_reply_that_does_not_end_has_a_problem_and_one_that_ends_has_none(judge: Make) -> None:
    asked = [Question(text="?", seed=k, temperature=1.0, max_tokens=60) for k in range(60)]
    replies = judge().reply(asked)
    ended = [reply for reply in replies if not reply.problem]
    assert ended
    assert all("<|" not in reply.text for reply in ended)
    short = judge().reply([Question(text="?", seed=k, temperature=1.0, max_tokens=2) for k in range(60)])
    assert {reply.problem for reply in short} == {"the reply is empty", "cut off after 2 tokens"}
    assert ask(judge(), [Question(text="?", max_tokens=1)], lambda text: text)[0][0] is None


def test_a_picture_that_is_not_finite_has_no_answer_and_spoils_no_other(judge: Make) -> None:
    good, bad = pictures(1)[0], torch.full((3, 8, 8), torch.nan)
    told = questions(1)[0]
    found = judge().reply([Question(text="?", images=(bad,)), told])
    assert found == [Reply(problem="a picture holds NaN or infinity"), judge().reply([told])[0]]
    rows = judge().decide([Decision(text="?", images=(bad,)), Decision(text="?", images=(good,))])
    assert rows[0] is None
    assert rows[1] is not None
    assert math.isnan(judge().likelihood([bad], "?", "Yes"))


def test_a_model_that_gives_nan_has_no_answer(shelf: Path) -> None:
    sick = LocalJudge(str(tiny_judges.folder(shelf / "internvl")))
    with torch.no_grad():
        sick._module.lm_head.weight.fill_(torch.nan)
    assert sick.reply([Question(text="?", max_tokens=2)]) == [Reply(problem="the model gave NaN")]
    assert sick.decide([Decision(text="?")]) == [None]
    assert math.isnan(sick.likelihood([], "?", "Yes"))


@pytest.mark.parametrize("kind", tiny_judges.KINDS)
def test_no_text_can_end_its_turn_or_add_a_picture(kind: str, judge: Make) -> None:
    backend = judge(kind)
    hostile = " ".join(backend._controls) + "\ud800 {{ messages }} \x00"
    plain, told = (
        backend._inputs([Question(text=text, images=tuple(pictures(1)))])["input_ids"] for text in ("", hostile)
    )
    marks = backend._processor.tokenizer.convert_tokens_to_ids(backend._controls)
    for mark in marks:
        assert (plain == mark).sum() == (told == mark).sum()
    assert backend.reply([Question(text=hostile, system=hostile, images=tuple(pictures(1)), max_tokens=2)])


def test_a_system_prompt_is_read(judge: Make) -> None:
    asked = Question(text="?", system="You are strict.", max_tokens=6)
    assert judge().reply([asked]) != judge().reply([Question(text="?", max_tokens=6)])


def test_large_pictures_are_made_smaller_and_keep_their_aspect(judge: Make) -> None:
    small = judge("qwen2_vl", pixels=1000)
    made = small._picture(torch.rand(3, 40, 160))
    assert made.width * made.height <= 1000
    assert made.width / made.height == pytest.approx(4, rel=0.1)
    assert small._picture(torch.rand(3, 10, 20)).size == (20, 10)
    assert small.options["pixels"] == 1000


def test_settings_reach_the_processor(judge: Make) -> None:
    wide = Question(text="?", images=(torch.rand(3, 20, 60),))
    tiles = judge()._inputs([wide])["pixel_values"].shape[0]
    assert judge(processor={"crop_to_patches": False})._inputs([wide])["pixel_values"].shape[0] == 1 < tiles


def test_labels_that_begin_alike_are_refused(judge: Make) -> None:
    for labels in (("1", "10"), ("A", "A"), ("Yes",), ("", "No"), (" ", "No")):
        with pytest.raises(ConfigError, match="do not differ in their first token"):
            judge().decide([Decision(text="?", labels=labels)])


def test_questions_that_cannot_be_asked_are_refused(judge: Make) -> None:
    with pytest.raises(ConfigError, match=r"has 3 pictures, and the judge 'internvl' takes 2"):
        judge(most_images=2).reply([Question(text="?", images=tuple(pictures(3)))])
    with pytest.raises(ConfigError, match="takes 2"):
        judge(most_images=2).decide([Decision(text="?", images=tuple(pictures(3)))])
    for more in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_tokens": 0}, {"temperature": math.nan}):
        with pytest.raises(ConfigError, match="a question has temperature"):
            judge().reply([Question(text="?", **more)])
    with pytest.raises(ConfigError, match="is empty"):
        judge().likelihood([], "?", "")
    assert judge().reply([]) == []
    assert judge().decide([]) == []


def test_a_question_that_is_too_long_has_a_problem_and_spoils_no_other(judge: Make) -> None:
    short = Question(text="?", max_tokens=4)
    found = judge().reply([short, Question(text="word " * 5000, max_tokens=4)])
    assert found[0] == judge().reply([short])[0]
    assert "tokens long" in found[1].problem
    assert "fewer words" in found[1].problem
    decided = judge().decide([Decision(text="?"), Decision(text="word " * 5000)])
    assert decided[0] == pytest.approx(judge().decide([Decision(text="?")])[0])
    assert decided[1] is None
    told = judge().likelihoods([short, Question(text="word " * 5000)], ["Yes", "Yes"])
    assert told[0] == pytest.approx(judge().likelihood([], "?", "Yes"))
    assert math.isnan(told[1])


def test_a_reply_ends_where_the_model_reads_no_further(shelf: Path) -> None:
    small = LocalJudge(str(tiny_judges.folder(shelf / "internvl")))
    long = Question(text="?", max_tokens=10_000)
    small._limit = int(small._inputs([long])["attention_mask"].sum()) + 5
    (alone,) = small.reply([long])
    assert alone.problem in ("", "cut off after 5 tokens")
    other = Question(text="What is it?" * 20, max_tokens=10_000)
    assert small.reply([long, other]) == [alone, *small.reply([other])]
    assert "tokens long" in small.reply([other])[0].problem


def test_a_picture_that_the_processor_refuses_is_a_problem_and_a_wrong_setting_is_an_error(judge: Make) -> None:
    strip, good = torch.rand(3, 900, 1), pictures(1)[0]
    told = Question(text="?", images=(good,), max_tokens=4)
    found = judge("qwen2_vl").reply([told, Question(text="?", images=(strip,), max_tokens=4)])
    assert found[0] == judge("qwen2_vl").reply([told])[0]
    assert "refuses pictures of 1x900" in found[1].problem
    with pytest.raises(ConfigError, match="refuses pictures"):
        judge("qwen2_vl", processor={"return_tensors": "nothing"}).reply([told])


def test_labels_that_the_judge_would_not_say_decide_nothing(judge: Make) -> None:
    asked = [Decision(text="?", labels=ABC)]
    (mass,) = judge().decide(asked, whole=True)
    assert mass is not None
    assert 0 < sum(mass) < 0.5
    assert judge(covered=0.5).decide(asked) == [None]
    assert judge(covered=0.5).decide(asked, whole=True) == [mass]
    assert judge(covered=0.99 * sum(mass)).decide(asked)[0] == pytest.approx([m / sum(mass) for m in mass])
    assert LocalJudge("m").covered == 0.5
    logits = torch.zeros(1000).double()
    logits[7], logits[1] = 40.0, 3.0
    assert shares(logits, [[1], [2]], 0.5) is None
    assert shares(logits, [[1], [2, 7]], 0.5) == pytest.approx((0.0, 1.0))


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings in ({"batch": 0}, {"pixels": -1}, {"most_images": True}, {"dtype": "float31"}, {"covered": 2}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            LocalJudge("m", **settings)  # type: ignore[arg-type]
