"""Every published set of preferences becomes comparisons with ranks, lazily, and malformed rows are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.preference_formats import FORMATS
from diffalign.data.preferences import Comparison, dense, overlap, prompt_key, read_comparisons, sniff
from diffalign.errors import ConfigError, DiffalignError, MediaError, UnknownName
from tests.data.files import encoded, jsonl, listed, parquet, picture
from tests.data.test_tables import OBJECTS, VALUES

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def colours(comparison: Comparison) -> list[tuple[int, int, int]]:
    return [image.getpixel((1, 1)) for image in comparison.images()]


def pick(caption: str, left: float, **more: object) -> dict[str, object]:
    row = {"caption": caption, "jpg_0": encoded("red"), "jpg_1": encoded("blue"), "label_0": left, "label_1": 1 - left}
    return {**row, "has_label": True, "num_example_per_prompt": 1} | more


def test_pickapic_labels_become_ranks_and_rows_without_a_label_are_left_out(tmp_path):
    rows = [pick("a", 1.0, num_example_per_prompt=4), pick("a", 0.0), pick("b", 0.5), pick("c", 1.0, has_label=False)]
    found = list(read_comparisons(parquet(tmp_path / "p.parquet", rows)))
    assert [one.ranks for one in found] == [(1, 2), (2, 1), (1, 1)]
    assert [one.weight for one in found] == [0.25, 1, 1]
    assert found[0].group == found[1].group != found[2].group
    assert colours(found[0]) == [RED, BLUE]
    assert found[0].case.prompt == "a"


def test_pickapic_without_its_images_says_so(tmp_path):
    rows = [pick("a", 1.0, jpg_0=None, jpg_1=None)]
    with pytest.raises(ConfigError, match=r"jpg_0.*has its images"):
        list(read_comparisons(parquet(tmp_path / "p.parquet", rows)))


def test_hpdv2_rankings_and_pairs_find_their_pictures(tmp_path):
    names = [picture(tmp_path / "test", f"{k}.jpg", c) for k, c in enumerate(("red", "green", "blue"))]
    raw = [{"rank": [2, 1, 3], "user_hash": "x"}, {"rank": [3, 1, 2], "user_hash": "y"}]
    row = {"prompt": "p", "image_path": names, "rank": [2, 1, 2], "raw_annotations": raw}
    (one,) = read_comparisons(listed(tmp_path / "test.json", [row]))
    assert one.ranks == (2, 1, 2)
    assert len(colours(one)) == 3
    (one,) = read_comparisons(listed(tmp_path / "test.json", [{**row, "rank": None}]))
    assert one.ranks == (2, 1, 2)  # 2.5, 1 and 2.5 on average
    pair = {"prompt": "p", "file_path": names[:2], "human_preference": [0, 1], "user_hash": "x"}
    (one,) = read_comparisons(listed(tmp_path / "train.json", [pair]), images=tmp_path / "test")
    assert (one.ranks, len(colours(one))) == ((2, 1), 2)


def test_hpdv3_prefers_the_first_path_unless_the_votes_are_even(tmp_path):
    row = {
        "prompt": "p",
        "path1": picture(tmp_path, "images/1.png"),
        "path2": picture(tmp_path, "images/2.png", "blue"),
    }
    rows = [
        {**row, "choice_dist": [9, 3], "confidence": 0.99, "model1": "x"},
        {**row, "choice_dist": [9, 3]},
        {**row, "choice_dist": [4, 4]},
        {**row, "confidence": None},
    ]
    found = list(read_comparisons(listed(tmp_path / "test.json", rows)))
    assert [one.ranks for one in found] == [(1, 2), (1, 2), (1, 1), (1, 2)]
    assert [one.confidence for one in found] == [0.99, 0.75, 0.5, None]
    assert colours(found[0]) == [RED, BLUE]


def test_hpdv3_votes_against_the_first_path_are_refused(tmp_path):
    row = {"prompt": "p", "path1": "1.png", "path2": "2.png"}
    path = jsonl(tmp_path / "test.jsonl", [{**row, "choice_dist": [9, 3]}, {**row, "choice_dist": [3, 9]}])
    with pytest.raises(ConfigError, match=r"test\.jsonl:2 has the votes \[3.0, 9.0\], which contradict 'path1'"):
        list(read_comparisons(path, "hpdv3"))


def test_imagereward_rows_of_one_prompt_have_one_prompt(tmp_path):
    row = {"prompt_id": "1", "prompt": "p", "rank": 1, "image_path": "a.png"}
    path = jsonl(tmp_path / "a.jsonl", [row, {**row, "prompt": "q", "rank": 2}])
    with pytest.raises(
        ConfigError, match=r"a\.jsonl:2 has another prompt than .*a\.jsonl:1, but the same prompt_id '1'"
    ):
        list(read_comparisons(path, "imagereward"))


def test_imagereward_groups_rows_by_prompt_wherever_they_stand(tmp_path):
    row = {"prompt": "p", "classification": "Outdoor Scenes", "image_amount_in_total": 2}
    name = "images/test/test_1/{}.png"
    paths = [picture(tmp_path, name.format(k), c) for k, c in enumerate(("red", "green", "blue"))]
    rows = [
        {**row, "prompt_id": "1", "rank": 2, "image_path": paths[0]},
        {**row, "prompt_id": "2", "rank": 1, "image_path": paths[1], "prompt": "q", "image_amount_in_total": 9},
        {**row, "prompt_id": "1", "rank": 1, "image_path": paths[2]},
        {**row, "prompt_id": "2", "rank": 1, "image_path": paths[2], "prompt": "q"},
        {**row, "prompt_id": "3", "rank": 1, "image_path": paths[2], "prompt": "alone"},
    ]
    found = list(read_comparisons(listed(tmp_path / "images" / "test" / "test_1" / "test_1.json", rows)))
    assert [(one.case.prompt, one.ranks) for one in found] == [("p", (2, 1)), ("q", (1, 1))]
    assert colours(found[0]) == [RED, BLUE]
    assert found[0].case.metadata == {"kind": "outdoor_scenes"}


def test_imagereward_lists_and_pairs_are_read_too(tmp_path):
    paths = [picture(tmp_path, f"{k}.png", c) for k, c in enumerate(("red", "blue"))]
    listing = listed(tmp_path / "a.json", [{"id": "x", "prompt": "p", "generations": paths, "ranking": [3, 1]}])
    assert [one.ranks for one in read_comparisons(listing)] == [(2, 1)]
    row = {"prompt_id": "1", "prompt": "p", "img_better": {"bytes": encoded("blue"), "path": "x"}}
    pairs = parquet(tmp_path / "b.parquet", [{**row, "img_worse": {"bytes": None, "path": paths[0]}}])
    (one,) = read_comparisons(pairs)
    assert (one.ranks, colours(one)) == ((1, 2), [BLUE, RED])


def test_edits_come_with_their_source_and_at_its_size(tmp_path):
    def image(colour: str, size: tuple[int, int] = (8, 8)) -> dict[str, object]:
        return {"bytes": encoded(colour, size), "path": None}

    row = {
        "key": ["k1", "k2"],
        "instruction": "make it blue",
        "input_image": image("green", (20, 10)),
        "output_images": [image("blue"), image("red", (20, 10))],
        "task_type": "color_alter",
        "dimension": "consistency",
    }
    (one,) = read_comparisons(parquet(tmp_path / "e.parquet", [row]))
    assert one.case.source is None  # not before it is asked for
    case = one.asked()
    assert case.source.getpixel((0, 0)) == GREEN
    assert [image.size for image in one.images(case.source)] == [(20, 10), (20, 10)]
    assert (one.ranks, one.aspect, one.kind) == ((1, 2), "consistency", "color_alter")
    other = parquet(tmp_path / "f.parquet", [{**row, "input_image": image("red")}])
    assert next(read_comparisons(other)).group != one.group  # the same words about another picture


def vote(choice: str, **more: object) -> dict[str, object]:
    paths = {"a_path": "media/a.png", "b_path": "media/b.png"}
    who = {"page": "x", "entry": "e", "a": "stock", "b": "tree", "voter": "ann", "left": "a", "blind": True}
    return {
        "format": "diffalign-votes",
        "version": 1,
        "prompt": "p",
        "choice": choice,
        "at": "2025-01-01",
        **paths,
        **who,
    } | more


def test_votes_count_when_they_are_blind_and_the_latest(tmp_path):
    picture(tmp_path, "media/a.png", "red")
    picture(tmp_path, "media/b.png", "blue")
    rows = [
        vote("a", at="2025-01-02"),
        vote("b"),
        vote("tie", voter="ben"),
        vote("b", voter="cy", blind=False),
        vote("b", voter="di", a_path=None),
    ]
    found = list(read_comparisons(jsonl(tmp_path / "votes.jsonl", rows)))
    assert [one.ranks for one in found] == [(1, 2), (1, 1)]
    assert colours(found[0]) == [RED, BLUE]


def test_plain_rows_say_everything_themselves(tmp_path):
    paths = [picture(tmp_path, f"{k}.png") for k in range(3)]
    row = {"prompt": "p", "images": paths, "ranks": [1, 2.5, 2.5], "kind": "counting", "weight": 0.5, "group": "g"}
    (one,) = read_comparisons(jsonl(tmp_path / "a.jsonl", [row | {"source": paths[0], "confidence": 0.9}]))
    assert (one.ranks, one.kind, one.weight, one.group, one.confidence) == ((1, 2, 2), "counting", 0.5, "g", 0.9)
    assert one.asked().source is not None


def test_pictures_are_opened_when_they_are_asked_for_and_name_their_row(tmp_path):
    rows = [pick("a", 1.0, jpg_1=b"no picture"), pick("b", 0.0)]
    first, second = read_comparisons(parquet(tmp_path / "p.parquet", rows))
    with pytest.raises(MediaError, match=r"p\.parquet row 1, 'jpg_1'"):
        first.images()
    assert len(second.images()) == 2
    rows = [{"prompt": "p", "images": ["absent.png", "https://example.org/a.png"], "ranks": [1, 2]}]
    (one,) = read_comparisons(jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(MediaError, match=r"a\.jsonl:1.*absent\.png"):
        one.pictures[0].open()
    with pytest.raises(MediaError, match="Download"):
        one.pictures[1].open()


def test_what_nothing_fits_lists_the_formats(tmp_path):
    with pytest.raises(ConfigError) as caught:
        sniff(jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "image": "a.png"}]))
    assert all(known in str(caught.value) for known in FORMATS)
    with pytest.raises(UnknownName, match="pickapic"):
        read_comparisons(tmp_path / "a.jsonl", "pickapick")


def test_a_file_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no comparison"):
        list(read_comparisons(parquet(tmp_path / "p.parquet", [pick("a", 1.0, has_label=False)])))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=6))
def test_dense_ranks_keep_order_and_ties(ranks):
    found = dense(ranks)
    assert sorted(set(found)) == list(range(1, len(set(ranks)) + 1))
    assert all((a < b) == (x < y) for a, x in zip(ranks, found, strict=True) for b, y in zip(ranks, found, strict=True))


def test_prompts_shared_by_two_sets_are_found_and_removing_them_leaves_none():
    train, test = ["A red  car", "a dog"], ["a red car", "two cats"]
    assert overlap(train, test) == ["a red car"]
    shared = {prompt_key(prompt) for prompt in overlap(train, test)}
    assert overlap(train, [prompt for prompt in test if prompt_key(prompt) not in shared]) == []


NAMES = sorted({name for format in FORMATS.values() for columns in format.columns for name in columns})
NAMES += ["image", "output_images", "choice_dist", "confidence", "format", "at", "blind", "weight", "source"]


@given(
    format=st.sampled_from(sorted(FORMATS)),
    rows=st.lists(
        OBJECTS | st.dictionaries(st.sampled_from(NAMES), VALUES | st.just("diffalign-votes"), max_size=12), max_size=3
    ),
)
def test_malformed_rows_give_comparisons_or_an_error_of_ours(tmp_path_factory, format, rows):
    path = jsonl(tmp_path_factory.mktemp("any") / "a.jsonl", rows)
    for name in (format, None):
        try:
            for one in read_comparisons(path, name):
                one.asked()
                one.images()
        except DiffalignError:
            pass


SOUND = {
    "votes": vote("a"),
    "hpdv2": {"prompt": "p", "image_path": ["a", "b", "c"], "rank": [1, 2, 3]},
    "hpdv2_pairs": {"prompt": "p", "file_path": ["a", "b"], "human_preference": [1, 0]},
    "hpdv3": {"prompt": "p", "path1": "a", "path2": "b", "choice_dist": [9, 3], "confidence": 0.9},
    "imagereward": {"prompt_id": "1", "prompt": "p", "image_path": "a", "rank": 1, "image_amount_in_total": 3},
    "imagereward_pairs": {"prompt": "p", "img_better": "a", "img_worse": "b"},
    "editreward": {"instruction": "p", "input_image": "a", "output_images": ["b", "c"], "task_type": "x"},
    "plain": {"prompt": "p", "images": ["a", "b"], "ranks": [1, 2], "weight": 1.0, "kind": "x"},
    "pickapic": {"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": 1, "label_1": 0, "num_example_per_prompt": 3},
}


@given(format=st.sampled_from(sorted(SOUND)), data=st.data())
def test_one_wrong_value_in_a_sound_row_is_borne_or_refused(tmp_path_factory, format, data):
    row = dict(SOUND[format])
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(VALUES)
    path = jsonl(tmp_path_factory.mktemp("any") / "a.jsonl", [SOUND[format], row])
    try:
        for one in read_comparisons(path, format):
            assert len(one.ranks) == len(one.pictures) >= 2
    except DiffalignError:
        pass
