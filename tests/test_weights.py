from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign import weights
from diffalign.errors import ConfigError, HubError, ModelError, OutputError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[k], STATE[k]) for k in STATE)


def kept() -> list[Path]:
    return sorted((weights.cache_folder() / "weights").glob("*"))


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.file),)


@pytest.mark.parametrize("suffix", weights.SAFE + weights.PICKLED)
def test_every_suffix_reads_the_same(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    save_file(STATE, file) if suffix in weights.SAFE else torch.save(STATE, file)
    assert same(weights.read(file))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_state_dict_is_converted_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    file = tmp_path / "x.pt"
    torch.save({"state_dict": STATE, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    assert same(weights.read(file, "state_dict"))
    assert [path.suffix for path in kept()] == [".safetensors"]
    monkeypatch.setattr(torch, "load", None)
    assert same(weights.read(file, "state_dict"))
    moved = file.rename(tmp_path / "renamed.pt")
    assert same(weights.read(moved, "state_dict"))  # the content tells, not the name


def test_what_is_under_one_entry_is_kept_apart_from_another(tmp_path: Path) -> None:
    torch.save({"one": {"a": torch.ones(1)}, "two": {"a": torch.zeros(1)}}, tmp_path / "x.pt")
    assert weights.read(tmp_path / "x.pt", "one")["a"] == 1
    assert weights.read(tmp_path / "x.pt", "two")["a"] == 0
    assert len(kept()) == 2


def test_an_entry_that_is_not_there_means_the_whole(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    assert same(weights.read(tmp_path / "x.pt", "state_dict"))


def test_tensors_that_share_memory_or_are_views_are_kept_whole(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    torch.save({"a": base, "b": base.t(), "c": base[0]}, tmp_path / "x.pt")
    found = weights.read(tmp_path / "x.pt")
    assert torch.equal(found["b"], base.t())
    assert torch.equal(found["c"], base[0])


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    assert weights.read(tmp_path / "x.pt")["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"a": torch.ones(1), "x": Trap(tmp_path / "sprung")}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="can run code, so it is not loaded"):
        weights.read(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists()
    assert kept() == []


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"args": argparse.Namespace(a=1), "state_dict": STATE}])
def test_a_pickled_module_and_plain_objects_are_refused_too(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="Ask its authors for a state dict"):
        weights.read(tmp_path / "x.pt", "state_dict")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no checkpoint"),
        (b"\0" * 50, "is no checkpoint"),
        (b"<html>not found</html>", "is no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1", "is no checkpoint"),
        (b"PK\x03\x04" + b"\0" * 50, "cannot read the weights"),
        (b"\x80\x02", "cannot read the weights|is not loaded"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_clear_error(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ModelError, match=says):
        weights.read(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_half_a_checkpoint_is_one_clear_error(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    save_file(STATE, file) if file.suffix in weights.SAFE else torch.save(STATE, file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ModelError, match=r"cannot read the weights .*Fetch them again"):
        weights.read(file)


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"we take \.safetensors, \.pt, \.pth, \.bin, \.ckpt"):
        weights.read(tmp_path / "x.gguf")


def test_a_checkpoint_without_tensors_says_what_it_has(tmp_path: Path) -> None:
    torch.save({"model": STATE, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(
        ModelError, match="no named tensors under 'weights', so it is no state dict; it has 'model', 'epo"
    ):
        weights.read(tmp_path / "x.pt", "weights")
    torch.save([torch.ones(1)], tmp_path / "y.pt")
    with pytest.raises(ModelError, match="no named tensors, so it is no state dict"):
        weights.read(tmp_path / "y.pt")


def test_a_damaged_converted_copy_is_made_again(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    weights.read(tmp_path / "x.pt")
    kept()[0].write_bytes(b"\0" * 10)
    assert same(weights.read(tmp_path / "x.pt"))
    assert load_file(kept()[0]).keys() == STATE.keys()


def test_two_processes_may_convert_at_once(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(300_000.0)}}, tmp_path / "x.pt")
    code = (
        "import sys; from pathlib import Path; from diffalign import weights\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(float(weights.read(Path(sys.argv[1]), 'state_dict')['a'].sum()))"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "x.pt")]
    runs = [subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin
        run.stdin.write("go\n")
        run.stdin.flush()
    assert {run.communicate(timeout=60)[0].strip() for run in runs} == {str(float(torch.arange(300_000.0).sum()))}
    assert [path.suffix for path in kept()] == [".safetensors"]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "file"))
    torch.save(STATE, tmp_path / "x.pt")
    with pytest.raises(OutputError, match="Set DIFFALIGN_CACHE to a folder that can be written"):
        weights.read(tmp_path / "x.pt")


def test_the_cache_follows_the_users_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert weights.cache_folder() == Path("/somewhere/diffalign")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.cache_folder() == Path.home() / ".cache" / "diffalign"


def test_weights_that_fit_are_loaded_and_frozen_in_the_type_asked_for() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    weights.fit(module, {"0.weight": STATE["a"], "0.bias": STATE["b"]}, "x")
    assert torch.equal(module[0].weight, STATE["a"])
    found = weights.frozen(module, torch.bfloat16)
    assert not found.training
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in found.parameters())


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, r"'weight' is \(2, 4\), not \(2, 3\)"),
        ({"weight": torch.ones(2, 3)}, "'bias' is missing"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "scale": torch.ones(1)}, "'scale' is unknown"),
        ({"w": torch.ones(1), "x": torch.ones(1), "y": torch.ones(1)}, "and 2 more. They are of another architecture"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_their_shapes(state: dict[str, torch.Tensor], says: str) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(ModelError, match=f"the weights of 'it' do not fit: .*{says}"):
        weights.fit(module, state, "'it'")
    assert torch.equal(module.weight, before)


def test_ignored_names_may_be_missing_or_surplus() -> None:
    weights.fit(nn.Linear(3, 2), {"weight": STATE["a"], "mask": torch.ones(1)}, "x", ignore=("mask", "bias"))


def test_a_rule_renames_and_drops() -> None:
    found = weights.renamed({"module.a": STATE["a"], "step": STATE["b"]}, lambda name: name[7:] or None)
    assert list(found) == ["a"]


def test_a_digest_tells_content_and_in_a_folder_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(STATE, tmp_path / name / "model.safetensors")
        (tmp_path / name / "README.md").write_text(name)  # says nothing about the weights
    one, two = tmp_path / "one", tmp_path / "two"
    assert weights.digest(one) == weights.digest(two)
    assert weights.digest(one / "model.safetensors") != weights.digest(one)
    (two / "model.safetensors").rename(two / "other.safetensors")
    assert weights.digest(one) != weights.digest(two)
    (one / "config.json").write_text("{}")
    before = weights.digest(one)
    (one / "config.json").write_text('{"a": 1}')
    assert weights.digest(one) != before


def test_a_weight_file_is_found_by_path_in_a_folder_and_as_its_safetensors_twin(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "head.pth")
    assert weights.find(str(tmp_path / "head.pth"), "else.pt") == tmp_path / "head.pth"
    assert weights.find(str(tmp_path), "head.pth") == tmp_path / "head.pth"
    save_file(STATE, tmp_path / "head.safetensors")
    assert weights.find(str(tmp_path), "head.pth") == tmp_path / "head.safetensors"
    assert weights.find(str(tmp_path), "else.pt") == tmp_path / "head.safetensors"
    save_file(STATE, tmp_path / "more.safetensors")
    with pytest.raises(ConfigError, match=r"has no 'else.pt', but 2 \.safetensors files"):
        weights.find(str(tmp_path), "else.pt")


@pytest.mark.parametrize("place", ["/nowhere/x.pt", "./x", "~/x/y", "a/b/c", "name", "owner/"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(ConfigError, match=r"there is no .* here, and it is not a hub id \(owner/name\)\. Do this"):
        weights.find(place, "x.pt", instead="Do this.")


def test_a_hub_id_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*args: Any, **options: Any) -> str:
        asked.append((args, options))
        return str(tmp_path / "x.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert weights.find("owner/name", "x.pt", "abc") == tmp_path / "x.pt"
    assert asked == [(("owner/name", "x.pt"), {"revision": "abc"})]


def test_without_network_the_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=r"cannot fetch 'x\.pt' of 'owner/name' .*there is no network here.* Do this"):
        weights.fetch("owner/name", "x.pt", instead="Do this.")
    with pytest.raises(HubError, match=r"cannot fetch 'owner/name' from the hub: there is no network here"):
        weights.fetch_folder("owner/name", ["*"])


def test_any_other_fault_of_the_hub_is_told_in_one_line() -> None:
    error = weights.hub_error("'x'", ValueError("gated repo\n\nlong advice"), "Do this.")
    assert str(error) == "cannot fetch 'x' from the hub: ValueError: gated repo. Do this."


def test_the_digest_of_a_folder_sees_through_links(tmp_path: Path) -> None:
    """Pipelines that share components link to them."""
    shared, folder = tmp_path / "shared", tmp_path / "model"
    shared.mkdir()
    folder.mkdir()
    (folder / "unet").symlink_to(shared, target_is_directory=True)
    save_file({"w": torch.zeros(2)}, shared / "w.safetensors")
    before = weights.digest(folder)
    save_file({"w": torch.ones(2)}, shared / "w.safetensors")
    assert weights.digest(folder) != before
