"""The learned map: closed forms on a line, what it is told by, and whose embeddings it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign import transport_map
from diffalign.errors import ConfigError, ModelError
from diffalign.transport_map import MapConfig

SMALL = MapConfig(width=32, steps=250, map_steps=5, batch=128, learning_rate=2e-3, every=50)


def normals(rows: int, size: int, seed: int) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shift", "scale"), [(1.5, 1.0), (0.5, 2.0)])
def test_on_a_line_the_map_is_shift_and_scale(shift: float, scale: float) -> None:
    source, target = normals(4000, 1, 0), shift + scale * normals(4000, 1, 1)
    made, card = transport_map.fit(source, target, SMALL, encoder="line")
    rows = torch.linspace(-1.5, 1.5, 7)[:, None]
    found = made(rows)
    assert bool((found.diff(dim=0) > 0).all())
    assert float((found - (shift + scale * rows)).abs().mean()) < 0.3
    last = card.history[-1]
    assert last["cost"] == pytest.approx(shift**2 + (scale - 1) ** 2, rel=0.35)
    assert last["variance"] == pytest.approx(1, abs=0.35)


def test_it_begins_as_the_identity_and_equal_seeds_learn_equal_maps() -> None:
    source, target = normals(300, 3, 0), normals(300, 3, 1) + 1
    assert torch.equal(transport_map.NeuralMap(3, 8)(source), source)
    told = MapConfig(width=8, steps=3, map_steps=2, batch=16, every=1)
    one, two = (transport_map.fit(source, target, told, encoder="x", seed=4)[0] for _ in range(2))
    assert torch.equal(one(source), two(source))
    assert not torch.equal(one(source), transport_map.fit(source, target, told, encoder="x", seed=5)[0](source))


def test_it_is_looked_at_by_pairs_that_do_not_teach() -> None:
    source, target = normals(300, 3, 0), normals(300, 3, 1) + 1
    told, rows = MapConfig(width=8, steps=4, map_steps=1, batch=16, every=2), list[dict[str, float]]()
    transport_map.fit(source, target, told, encoder="x", pairs=(source[:9], target[:9]), say=rows.append)
    assert [row["step"] for row in rows] == [2, 4]
    assert {"cost", "gap", "variance", "cosine", "plain_cosine"} <= set(rows[0])


def test_a_collapsed_map_is_refused() -> None:
    told = MapConfig(width=8, steps=1, map_steps=1, batch=8, every=1)
    with pytest.raises(ModelError, match="it has collapsed"):
        transport_map.fit(torch.ones(50, 2), normals(50, 2, 0), told, encoder="x")


def test_a_saved_map_is_the_same_and_takes_its_own_embeddings_alone(tmp_path: Path) -> None:
    told = MapConfig(width=8, steps=3, map_steps=2, batch=16, every=1)
    made, card = transport_map.fit(normals(60, 3, 0), normals(60, 3, 1), told, encoder="tower 7", normalised=True)
    folder = transport_map.save(tmp_path / "map", made, card)
    rows = normals(5, 3, 2)
    assert torch.equal(transport_map.load(folder, encoder="tower 7", normalised=True)(rows), made(rows))
    with pytest.raises(ModelError, match="by 'tower 7', and these are by 'tower 8'"):
        transport_map.load(folder, encoder="tower 8", normalised=True)
    with pytest.raises(ModelError, match="of length 1"):
        transport_map.load(folder, encoder="tower 7")
    (folder / "map.json").write_text(json.dumps({"encoder": "tower 7"}))
    with pytest.raises(ModelError, match="no card of a map"):
        transport_map.load(folder, encoder="tower 7")


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        ((5, 3), (5, 4), "no two clouds"),
        ((1, 3), (5, 3), "no two clouds"),
    ],
)
def test_rows_that_are_no_clouds_are_refused(one: tuple[int, int], two: tuple[int, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        transport_map.fit(torch.zeros(one), torch.zeros(two), SMALL, encoder="x")


def test_embeddings_that_are_not_finite_and_settings_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        transport_map.fit(torch.full((5, 2), torch.nan), torch.zeros(5, 2), SMALL, encoder="x")
    with pytest.raises(ConfigError, match="a batch of 2"):
        MapConfig(batch=1)
