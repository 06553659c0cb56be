"""Which models are opened, which are refused, and what tells one from another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from diffalign.errors import ConfigError, HubError, ModelError
from diffalign.judges import local
from diffalign.judges.asking import Backend, Decision, Question
from diffalign.judges.local import LocalJudge
from tests.judges import tiny_judges
from tests.judges.test_local import questions

Make = Callable[..., LocalJudge]


def test_a_judge_is_a_backend_and_loads_nothing_until_it_is_asked() -> None:
    made = LocalJudge("nobody/nothing")
    assert {"name", "most_images", "version", "reply", "decide"} <= set(dir(made))
    assert made.name == "nothing"
    with pytest.raises(HubError, match="cannot fetch 'nobody/nothing'"):
        made.reply([Question(text="?")])
    with pytest.raises(ConfigError, match="not a hub id"):
        _ = LocalJudge("shapes-vlmm").version


def test_a_backend_can_be_told(judge: Make) -> None:
    assert isinstance(judge(), Backend)


def test_the_version_changes_with_weights_template_and_tokenizer(shelf: Path, tmp_path: Path) -> None:
    own = LocalJudge(str(tiny_judges.folder(shelf / "internvl"))).version
    assert own == LocalJudge(str(shutil.copytree(shelf / "internvl", tmp_path / "same"))).version
    assert own != LocalJudge(str(tiny_judges.folder(tmp_path / "other", seed=1))).version
    for name in ("chat_template.jinja", "tokenizer_config.json", "processor_config.json"):
        copy = shutil.copytree(shelf / "internvl", tmp_path / name)
        with (copy / name).open("a") as file:
            file.write("\n")
        assert LocalJudge(str(copy)).version != own


def spoiled(shelf: Path, place: Path, *lost: str, **settings: Any) -> LocalJudge:
    copy = shutil.copytree(tiny_judges.folder(shelf / "internvl"), place)
    for name in lost:
        (copy / name).unlink()
    if settings:
        told = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(told | settings))
    return LocalJudge(str(copy))


def test_folders_that_are_no_judges_are_refused(shelf: Path, tmp_path: Path) -> None:
    asked = [Question(text="?", max_tokens=1)]
    with pytest.raises(ConfigError, match=r"no config\.json"):
        spoiled(shelf, tmp_path / "a", "config.json").reply(asked)
    with pytest.raises(ConfigError, match="is a 'bert', which does not answer about pictures"):
        spoiled(shelf, tmp_path / "b", model_type="bert").reply(asked)
    with pytest.raises(ModelError, match="settings"):
        spoiled(shelf, tmp_path / "c", model_type="mine", auto_map={"AutoConfig": "x.Y"}).reply(asked)
    with pytest.raises((ConfigError, ModelError), match="processor"):
        spoiled(shelf, tmp_path / "d", "processor_config.json").reply(asked)
    with pytest.raises((ConfigError, ModelError), match=r"processor|tokenizer"):
        spoiled(shelf, tmp_path / "e", "tokenizer.json").reply(asked)
    with pytest.raises(ConfigError, match="no chat template"):
        spoiled(shelf, tmp_path / "f", "chat_template.jinja").reply(asked)
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        spoiled(shelf, tmp_path / "g", "model.safetensors").reply(asked)


def test_pickled_weights_and_code_beside_a_model_are_never_run(shelf: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(witness)!r}).touch()\n"
    told = spoiled(
        shelf, tmp_path / "m", auto_map={"AutoModelForImageTextToText": "mine.Model", "AutoConfig": "mine.C"}
    )
    for name in ("mine.py", "custom_generate/generate.py"):
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_text(code)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    assert told.reply([Question(text="?", max_tokens=1)])
    assert not witness.exists()


def test_weights_that_lack_a_part_are_refused(shelf: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    told = spoiled(shelf, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    name = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != name}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lack"):
        told.reply([Question(text="?", max_tokens=1)])
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot read the model"):
        LocalJudge(str(tmp_path / "m")).reply([Question(text="?", max_tokens=1)])


def test_a_models_own_way_to_sample_is_set_aside(shelf: Path, tmp_path: Path, judge: Make) -> None:
    told = spoiled(shelf, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    own = {"do_sample": True, "temperature": 0.1, "repetition_penalty": 5.0, "top_k": 1, "max_new_tokens": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    assert told.reply(questions(4)) == judge().reply(questions(4))


def test_an_adapter_is_merged_and_counts_in_the_version(shelf: Path, tmp_path: Path, judge: Make) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = tiny_judges.folder(shelf / "internvl")
    model = AutoModelForImageTextToText.from_pretrained(base)
    told = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, told).save_pretrained(tmp_path / "lora")
    adapted = LocalJudge(str(base), adapter=str(tmp_path / "lora"), covered=0.0)
    asked = [Decision(text="?")]
    assert adapted.decide(asked) != judge().decide(asked)
    assert adapted.version.startswith(judge().version)
    assert adapted.version != judge().version
    with pytest.raises(ConfigError, match="is no adapter"):
        LocalJudge(str(base), adapter=str(base)).decide(asked)


def test_a_model_of_the_hub_is_known_by_its_commit(
    shelf: Path, tmp_path: Path, judge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place, commit = tmp_path / "models--some--model", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_judges.folder(shelf / "internvl"), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    found = LocalJudge("some/model")
    assert found.version == f"some/model@{commit}"
    assert found.reply(questions(2)) == judge().reply(questions(2))
    assert LocalJudge("some/model", revision=commit).version == found.version
    with pytest.raises(HubError, match="cannot fetch"):
        _ = LocalJudge("some/model", revision="other").version
    with pytest.raises(ConfigError, match="revision 'other' picks a commit on the hub"):
        _ = LocalJudge(str(shelf / "internvl"), revision="other").version


def test_threads_that_ask_at_once_load_one_model_and_get_their_own_answers(
    shelf: Path, judge: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = local.open_model
    monkeypatch.setattr(local, "open_model", lambda *told: opened.append(told) or real(*told))
    made = LocalJudge(str(tiny_judges.folder(shelf / "internvl")))
    asked = questions(6)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda question: made.reply([question])[0], asked))
    assert found == judge().reply(asked)
    assert len(opened) == 1
