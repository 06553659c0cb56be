from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from diffalign.detectors import TransformersDetector, find_detector
from diffalign.errors import ConfigError, ModelError
from diffalign.rules.geneval import Detection
from diffalign.vision import to_pil

NAMES = {0: "cat", 1: "traffic_light", 2: "mouse"}
IDS = {"id2label": NAMES, "label2id": {name: k for k, name in NAMES.items()}}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
}
ASKED = ["cat", "traffic light", "computer mouse"]


def make_masks(folder: Path) -> None:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        **IDS,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(folder)


def make_boxes(folder: Path) -> None:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"]),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=8,
        **IDS,
    )
    model = DetrForObjectDetection(config)
    model.class_labels_classifier.weight.data.mul_(20)  # so that queries differ in what they find
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder)


def make_owl(folder: Path) -> None:
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    config = Owlv2Config(
        text_config={
            **small,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 64,
            "bos_token_id": start,
            "eos_token_id": end,
        },
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={word: k for k, word in enumerate(vocabulary)}, merges=[], model_max_length=64)
    image_processor = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)


def make_grounding(folder: Path) -> None:
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "traffic", "light", "computer", "mouse"]
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage2", "stage3", "stage4"]),
        text_config={
            "model_type": "bert",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": len(words),
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        max_text_len=24,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(words)})
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    GroundingDinoProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)


MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "mask2former": (make_masks, "masks"),
    "detr": (make_boxes, "boxes"),
    "owlv2": (make_owl, "zero-shot"),
    "grounding-dino": (make_grounding, "zero-shot"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    with torch.random.fork_rng():
        for name, (make, _) in MAKERS.items():
            torch.manual_seed(1)
            made[name] = tmp_path_factory.mktemp(name)
            make(made[name])
    return made


@pytest.fixture(scope="module")
def detectors(folders: dict[str, Path]) -> dict[str, TransformersDetector]:
    return {name: TransformersDetector(str(folder), floor=0.01) for name, folder in folders.items()}


def media_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 3, 40, 56, generator=torch.Generator().manual_seed(seed))


def near(a: list[Detection], b: list[Detection]) -> bool:
    return len(a) == len(b) and all(
        (p.label, p.confidence, p.box)
        == (q.label, pytest.approx(q.confidence, abs=1e-4), pytest.approx(q.box, abs=1e-2))
        for p, q in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_each_kind_of_model_finds_something_and_a_batch_equals_single_pictures(
    name: str, detectors: dict[str, TransformersDetector]
) -> None:
    detector, media = detectors[name], media_of(3)
    assert detector.kind == MAKERS[name][1]
    asked = [ASKED, ["cat"], ASKED]
    found = detector.detect(media, asked)
    assert any(found)
    for row, labels in zip(found, asked, strict=True):
        assert {one.label for one in row} <= set(labels)
        assert all(0.01 <= one.confidence <= 1 for one in row)
    for k in range(3):
        assert near(detector.detect(media[k : k + 1], [asked[k]])[0], found[k])
    detector.batch, batch = 1, detector.batch
    assert all(near(a, b) for a, b in zip(detector.detect(media, asked), found, strict=True))
    detector.batch = batch


@pytest.mark.parametrize("name", MAKERS)
def test_models_are_frozen_keep_the_random_state_and_build_no_graph(name: str, folders: dict[str, Path]) -> None:
    before = torch.random.get_rng_state()
    fresh = TransformersDetector(str(folders[name]), floor=0.0)
    with torch.inference_mode():
        fresh.detect(media_of(1), [["cat"]])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(w.requires_grad or w.is_inference() for w in fresh.module.parameters())
    assert not fresh.module.training


def test_object_detection_gives_the_boxes_of_the_published_post_processing(
    detectors: dict[str, TransformersDetector],
) -> None:
    detector, media = detectors["detr"], media_of(2)
    inputs = detector.processor(images=to_pil(media), return_tensors="pt")
    with torch.no_grad():
        outputs = detector.module(**inputs)
    rows = detector.processor.post_process_object_detection(outputs, threshold=0.01, target_sizes=[(40, 56)] * 2)
    for row, found in zip(rows, detector.detect(media, [ASKED, ASKED]), strict=True):
        assert [ASKED[k] for k in row["labels"].tolist()] == [one.label for one in found]  # by synonym and underscore
        assert [one.confidence for one in found] == pytest.approx(row["scores"].tolist())


def test_boxes_of_a_segmentation_model_are_those_of_its_masks(detectors: dict[str, TransformersDetector]) -> None:
    for one in detectors["mask2former"].detect(media_of(1), [ASKED])[0]:
        assert one.mask is not None
        assert one.mask.shape == (40, 56)
        left, top, right, bottom = map(int, one.box)
        inside = torch.zeros_like(one.mask)
        inside[top:bottom, left:right] = True
        assert not (one.mask & ~inside).any()
        assert all(
            edge.any() for edge in (one.mask[top], one.mask[bottom - 1], one.mask[:, left], one.mask[:, right - 1])
        )


def test_grounding_gives_each_box_the_phrase_of_its_likeliest_token(
    detectors: dict[str, TransformersDetector],
) -> None:
    detector, media = detectors["grounding-dino"], media_of(1)
    inputs = detector.processor(images=to_pil(media), text=[["cat", "traffic light"]], return_tensors="pt")
    with torch.no_grad():
        outputs = detector.module(**inputs)
    likely = outputs.logits[0].sigmoid()  # tokens: [CLS] cat . traffic light . [SEP]
    cat, light = likely[:, 1], likely[:, 3:5].amax(1)
    found = detector.detect(media, [["cat", "traffic light"]])[0]
    best = [max((float(c), "cat"), (float(x), "traffic light")) for c, x in zip(cat, light, strict=True)]
    assert [(one.confidence, one.label) for one in found] == [
        (pytest.approx(value, abs=1e-5), name) for value, name in best if value > 0.01
    ]


def test_a_full_stop_in_a_label_shifts_no_phrase(detectors: dict[str, TransformersDetector]) -> None:
    detector, media = detectors["grounding-dino"], media_of(1)
    dotted, plain = ["traffic. light", "cat", "mouse."], ["traffic light", "cat", "mouse"]
    found, expected = (detector.detect(media, [labels])[0] for labels in (dotted, plain))
    renamed = dict(zip(plain, dotted, strict=True))
    assert len({one.label for one in found}) > 1
    assert [(one.label, one.confidence) for one in found] == [(renamed[o.label], o.confidence) for o in expected]


def test_the_floor_drops_what_is_less_sure(folders: dict[str, Path]) -> None:
    low, high = (TransformersDetector(str(folders["owlv2"]), floor=f).detect(media_of(1), [ASKED])[0] for f in (0, 0.5))
    assert 0 < len(high) < len(low)
    assert near(high, [one for one in low if one.confidence > 0.5])


def test_the_version_tells_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    versions = {name: find_detector(str(folder)).version for name, folder in folders.items()}
    assert len(set(versions.values())) == len(versions)
    make_boxes(tmp_path)  # other random weights
    assert find_detector(str(tmp_path)).version != versions["detr"]


def test_a_class_the_model_does_not_know_is_one_clear_error(detectors: dict[str, TransformersDetector]) -> None:
    with pytest.raises(ConfigError, match=r"does not know the class 'cart'; it has 3 others. Did you mean 'cat'\?"):
        detectors["detr"].detect(media_of(1), [["cart"]])


def test_a_folder_that_finds_no_objects_or_is_damaged_is_one_clear_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ConfigError, match=r"a model of the type 'bert' \(BertModel\) finds no objects"):
        find_detector(str(tmp_path)).detect(media_of(1), [["cat"]])
    (tmp_path / "config.json").write_text((folders["detr"] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ModelError, match="transformers cannot load"):
        find_detector(str(tmp_path)).detect(media_of(1), [["cat"]])
