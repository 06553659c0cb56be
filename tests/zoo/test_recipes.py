"""Recipes are seeded and resumable: a stopped run ends at the weights of one that was never stopped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffalign import world, zoo
from diffalign.errors import UnknownName
from diffalign.world.compose import HELD_OUT_PAIRS
from diffalign.world.grammar import TAGS, Clauses
from diffalign.world.see import Sight
from diffalign.world.verifier import judge
from diffalign.zoo.autoencoder import AutoencoderConfig
from diffalign.zoo.coding import CODES, codes_in, directions, encode_layout, scene_of, usual_places
from diffalign.zoo.fit import FitConfig, fit
from diffalign.zoo.sd3 import EVEN, Round, SD3Config, captioned, tokenise
from diffalign.zoo.words import LENGTH, known, tokenizer


class Stop(Exception):
    """A run that is interrupted."""


class Tiny(nn.Module):
    """A block matrix, which Muon updates, and a head, which AdamW updates."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.Sequential(nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)


def run(folder: Path, *, stop_at: int | None = None) -> Tiny:
    torch.manual_seed(0)
    model = Tiny()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if step == stop_at:
            raise Stop
        x = torch.randn(8, 4, generator=generator)
        return (model.head(model.transformer_blocks(x)) - x[:, :1]).square().mean()

    config = FitConfig(steps=6, save_every=3, warmup=2, matrix_rate=1e-3)
    fit(model, loss, config, folder=folder, seed=0, resume=True, title="tiny")
    return model


def test_an_interrupted_run_ends_at_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "broken", stop_at=4)
    resumed = run(tmp_path / "broken")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def small() -> SD3Config:
    """The generator's recipe, shrunk to seconds."""
    brief = FitConfig(steps=2, save_every=1, warmup=1, matrix_rate=1e-3)
    autoencoder = AutoencoderConfig(channels=8, batch=2, images=16, fit=FitConfig(steps=2, save_every=1, warmup=1))
    return SD3Config(
        layers=1,
        heads=1,
        text_widths=(32, 32),
        text_layers=(2, 2),
        images=16,
        batch=2,
        rounds=(Round(fit=brief), Round(fit=brief, draw=2)),
        autoencoder=autoencoder,
    )


def test_build_resumes_to_the_weights_of_an_uninterrupted_build(tmp_path: Path) -> None:
    from diffalign.zoo.sd3 import train

    whole = train(small(), folder=tmp_path / "whole", seed=3, resume=False)
    first = train(small(), folder=tmp_path / "again", seed=3, resume=False)
    again = train(small(), folder=tmp_path / "again", seed=3, resume=True)
    for part in ("transformer", "text_encoder", "vae"):
        for other in (first, again):
            pairs = zip(getattr(whole, part).parameters(), getattr(other, part).parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)


def test_build_writes_a_pipeline_with_a_card(tmp_path: Path) -> None:
    folder = zoo.build("shapes-sd3", out=tmp_path, seed=1, config=small(), n=3)
    card = (folder / "card.json").read_text()
    assert '"command": "diffalign zoo build shapes-sd3 --seed 1"' in card
    assert '"heldout"' in card


def test_build_of_an_unknown_name_lists_the_recipes(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="shapes-turbo"):
        zoo.build("shapes-turbe", out=tmp_path)


def test_training_captions_hold_no_held_out_composition() -> None:
    captions, _ = captioned(300, 6.0, 0, EVEN)
    assert not any(world.held_out(world.parse(caption) or Clauses(())) for caption in captions)


def test_every_word_of_the_grammar_is_one_token_and_every_prompt_fits() -> None:
    tokens, rng = tokenizer(), random.Random(0)
    prompts = [world.say(world.sample_clauses(kind, rng)) for kind in (*TAGS, "hard") for _ in range(60)]
    ids = tokens(prompts)["input_ids"]
    assert max(map(len, ids)) <= LENGTH
    assert max(max(row) for row in ids) < known()
    assert tokenise(["a red circle"]).tolist()[0][:5] == tokens("a red circle")["input_ids"]


def test_coded_noise_stays_standard_normal_and_carries_its_code() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, codes = torch.randn(64, 4, 16, 16, generator=generator), torch.randn(64, CODES, generator=generator)
    coded = encode_layout(noise, codes)
    assert torch.allclose(codes_in(coded), codes, atol=1e-4)
    assert torch.allclose(
        coded - encode_layout(noise, torch.zeros_like(codes)), encode_layout(0 * noise, codes), atol=1e-5
    )
    assert coded.std() == pytest.approx(1, abs=0.02)
    basis = directions().flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(CODES), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from((*TAGS, "hard")), seed=st.integers(0, 10**6))
def test_every_noise_means_a_scene_that_fulfils_its_prompt(kind: str, seed: int) -> None:
    clauses = world.sample_clauses(kind, random.Random(seed))
    codes = 3 * torch.randn(CODES, generator=torch.Generator().manual_seed(seed))
    scene = scene_of(clauses, codes.tolist())
    assert judge(Sight(scene.shapes), clauses).strict
    wants = [want for want in clauses.wants for _ in range(want.count)]
    free = [shape for shape, want in zip(scene.shapes, wants, strict=True) if not want.colour]
    assert not any((shape.colour, shape.kind) in HELD_OUT_PAIRS for shape in free)


def test_codes_move_grow_and_colour_what_the_prompt_leaves_open() -> None:
    asked = world.parse("a circle")
    assert asked
    usual = scene_of(asked, [0.0] * CODES).shapes[0]
    assert (usual.x, usual.y) == usual_places(asked)[0]
    moved, grown = (
        scene_of(asked, [1.0, *[0.0] * 16]).shapes[0],
        scene_of(asked, [0.0, 0.0, 1.0, *[0.0] * 14]).shapes[0],
    )
    assert moved.x > usual.x
    assert moved.y == usual.y
    assert moved.radius == usual.radius
    assert grown.radius > usual.radius
    assert grown.x == usual.x
    assert len({scene_of(asked, [0.0] * 3 + [hue] + [0.0] * 13).shapes[0].colour for hue in (-2.0, 0.0, 2.0)}) == 3
    assert len({scene_of(asked, [0.0] * 16 + [ground]).ground for ground in (-2.0, 0.0, 2.0)}) == 3
