"""What is trained, over the tiny families: an exact start, stock loading to the bit, and no trace after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from diffalign import config as configs
from diffalign.drive import Driver
from diffalign.errors import ConfigError, DiffalignError, ModelError, OutputError, UnknownName
from diffalign.snapshot import differences, snapshot
from diffalign.train import adapters
from diffalign.train.adapters import ADAPTER, AdapterConfig, attach, find_denoisers
from diffalign.train.ema import BEGUN, Ema
from diffalign.train.precision import autocast, checkpointing, compiled
from tests.tiny import FAMILIES, build, call

EVERY = [name for name in FAMILIES if not FAMILIES[name].broken and not name.startswith("sd15_")]
USUAL = ("sd15", "sdxl", "sd3", "flux", "pixart_sigma", "sana", "qwen_image", "wan22")
ALL = [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
NO_PEFT = ("pixart_sigma", "pixart_alpha", "hunyuan_dit")  # diffusers gives these denoisers no adapter methods
BY_FLAG = (
    "sd3_controlnet",
)  # its autoencoder multiplies transposed tensors: torch picks a frozen weight another kernel
SMALL = AdapterConfig(rank=2)


def made(name: str) -> Any:
    """A fresh pipeline; frozen as a stock user may freeze it where torch rounds frozen weights otherwise."""
    pipe = build(name)
    for part in pipe.components.values() if name in BY_FLAG else ():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipe


def shown(pipe: Any, name: str, steps: int = 2) -> torch.Tensor:
    """The stock image, on two steps; both experts of a pair denoise one."""
    out = pipe(
        **call(name) | {"num_inference_steps": steps}, generator=torch.Generator().manual_seed(1), output_type="pt"
    )
    return torch.as_tensor(out[0] if isinstance(out[0], torch.Tensor) else out[0][0])


@torch.no_grad()
def train(trained: adapters.Trained) -> None:
    """Any weights but the start's."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trained.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def stock_load(pipe: Any, folder: Any, name: str) -> None:
    """The lines a user of the stock pipeline writes."""
    if name in NO_PEFT:
        peft.PeftModel.from_pretrained(pipe.transformer, str(folder))
        return
    pipe.load_lora_weights(str(folder))
    if name == "wan22":
        pipe.load_lora_weights(str(folder / "transformer_2"), load_into_transformer_2=True)


@pytest.mark.parametrize("name", ALL)
def test_a_lora_starts_at_the_base_and_a_stock_pipeline_shows_the_trained_images_to_the_bit(name, tmp_path):
    torch.manual_seed(0)  # one stock class also draws from the global generator
    pipe, state = made(name), torch.get_rng_state()
    base, fresh = shown(pipe, name), snapshot(pipe)
    trained = attach(pipe, SMALL)
    torch.set_rng_state(state)
    assert torch.equal(shown(pipe, name), base)
    train(trained)
    torch.set_rng_state(state)
    after = shown(pipe, name)
    assert not torch.equal(after, base)
    with trained.reference():
        torch.set_rng_state(state)
        assert torch.equal(shown(pipe, name), base)
    trained.save(tmp_path / "lora")
    for load in (stock_load, lambda pipe, folder, name: adapters.load(pipe, folder)):
        stock = made(name)
        load(stock, tmp_path / "lora", name)
        torch.set_rng_state(state)
        assert torch.equal(shown(stock, name), after)
    trained.detach()
    assert differences(fresh, snapshot(pipe)) == []
    torch.set_rng_state(state)
    assert torch.equal(shown(pipe, name), base)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart_sigma", "sana", "wan22"])
def test_the_printed_lines_load_the_lora(name, tmp_path):
    trained = attach(build(name), AdapterConfig(rank=3, alpha=5))  # a scale that no power of two hides
    train(trained)
    lines = trained.how_to_load(trained.save(tmp_path / "lora"))
    pipe = build(name)
    for line in lines:
        exec(line, {"pipe": pipe, "peft": peft})
    assert torch.equal(shown(pipe, name), shown(trained.pipe, name))


@pytest.mark.parametrize("name", NO_PEFT)
def test_a_denoiser_without_adapter_methods_is_saved_for_peft_and_says_so(name):
    assert attach(build(name), SMALL).how_to_load("here") == [
        "peft.PeftModel.from_pretrained(pipe.transformer, 'here')"
    ]


@pytest.mark.parametrize("name", ["sd3", "wan22", "sd15"])
def test_full_weights_start_at_the_base_and_load_as_components(name, tmp_path):
    pipe = build(name)
    base = shown(pipe, name)
    trained = attach(pipe, AdapterConfig(kind="full"))
    assert trained.count == sum(p.numel() for m in trained.denoisers.values() for p in m.parameters())
    assert torch.equal(shown(pipe, name), base)
    train(trained)
    after = shown(pipe, name)
    with trained.reference():
        assert torch.equal(shown(pipe, name), base)
    assert torch.equal(shown(pipe, name), after)
    lines = trained.how_to_load(trained.save(tmp_path / "weights"))
    stock, other = build(name), build(name)
    for line in lines:
        exec(line, {"pipe": stock})
    for parameter in (p for part in trained.denoisers for p in getattr(stock, part).parameters()):
        parameter.data = (
            parameter.data.clone()
        )  # weights mapped from a file lie unaligned, where torch may round otherwise
    adapters.load(other, tmp_path / "weights")
    assert torch.equal(shown(stock, name), after)
    assert torch.equal(shown(other, name), after)
    trained.detach()
    assert torch.equal(shown(pipe, name), base)


def test_full_weights_are_saved_in_a_smaller_dtype_and_stay_as_they_are(tmp_path):
    trained = attach(build("sd3"), AdapterConfig(kind="full"))
    before = trained.state_dict()
    trained.save(tmp_path / "half", dtype=torch.bfloat16)
    module = type(trained.pipe.transformer).from_pretrained(
        tmp_path / "half" / "transformer", torch_dtype=torch.bfloat16
    )
    assert all(torch.equal(p, before[f"transformer.{n}"].bfloat16()) for n, p in module.named_parameters())
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())


def test_full_weights_of_some_layers_train_those_only():
    trained = attach(build("sd3"), AdapterConfig(kind="full", targets=("to_q",)))
    names = [name for name, _ in trained.named_parameters()]
    assert names
    assert all(".to_q." in name for name in names)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_model_in_half_precision_trains_float32_weights(kind):
    pipe = build("sd3").to(torch.bfloat16)
    base = shown(pipe, "sd3")
    trained = attach(pipe, AdapterConfig(rank=2, kind=kind))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    if kind == "lora":
        assert torch.equal(shown(pipe, "sd3"), base)
    trained.detach()
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert torch.equal(shown(pipe, "sd3"), base)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_gives_the_very_prediction_before_training(kind):
    pipe = build("sd3")
    driver = Driver(pipe, **call("sd3"))
    trained = attach(pipe, AdapterConfig(rank=2, kind=kind))
    x = driver.start()
    policy = driver.predict(x, 1)
    with trained.reference():
        base = driver.predict(x, 1)
    assert ((policy - base) ** 2).sum() == 0  # the KL of equal variances is this over their double


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reference_between_forward_and_backward_leaves_the_gradient(kind):
    def gradients(between: bool) -> list[torch.Tensor]:
        pipe = build("sd3")
        trained = attach(pipe, AdapterConfig(rank=2, kind=kind))
        train(trained)
        driver = Driver(pipe, **call("sd3"))
        loss = driver.predict(driver.start(), 1, grad=True).square().sum()
        if between:
            with trained.reference():
                driver.predict(driver.start(), 1)
        loss.backward()
        return [p.grad for p in trained.parameters() if p.grad is not None]

    alone, disturbed = gradients(False), gradients(True)
    assert alone
    assert all(torch.equal(a, b) for a, b in zip(alone, disturbed, strict=True))


def test_only_the_adapter_asks_for_gradients_and_only_the_denoiser_has_one():
    pipe = build("sd_controlnet")
    trained = attach(pipe, SMALL)
    asking = {
        p for m in pipe.components.values() if isinstance(m, nn.Module) for p in m.parameters() if p.requires_grad
    }
    assert asking == set(trained.parameters())
    assert list(trained.denoisers) == ["unet"]
    assert all(not p.requires_grad for p in pipe.controlnet.parameters())


def test_weights_come_and_go_as_a_state_dict():
    first, second = attach(build("sd3"), SMALL), attach(build("sd3"), SMALL)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    train(first)
    second.load_state_dict(first.state_dict())
    assert torch.equal(shown(first.pipe, "sd3"), shown(second.pipe, "sd3"))
    assert first.count == sum(t.numel() for t in first.state_dict().values())
    assert {t.dtype for t in first.state_dict().values()} == {torch.float32}
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in first.state_dict()
    with pytest.raises(ModelError, match="of another shape"):
        attach(build("sd3"), AdapterConfig(rank=3)).load_state_dict(first.state_dict())


def test_the_start_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    one = attach(build("sd3"), SMALL).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    same, other = (
        attach(build("sd3"), SMALL).state_dict(),
        attach(build("sd3"), AdapterConfig(rank=2, seed=1)).state_dict(),
    )
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    uniform = attach(build("sd3"), AdapterConfig(rank=2, init="default")).state_dict()[name]
    assert 0 < uniform.abs().max() <= 1 / 4  # 1 / sqrt(16 inputs)


def test_an_adapter_that_was_there_stays_on_and_belongs_to_the_reference(tmp_path):
    style = attach(build("sd3"), AdapterConfig(rank=2, seed=9))
    train(style)
    style.save(tmp_path / "style")
    pipe = build("sd3")
    pipe.load_lora_weights(str(tmp_path / "style"), adapter_name="style")
    styled, before = shown(pipe, "sd3"), snapshot(pipe)
    trained = attach(pipe, SMALL)
    assert torch.equal(shown(pipe, "sd3"), styled)
    assert len(trained.parameters()) == len(style.parameters())
    train(trained)
    after = shown(pipe, "sd3")
    with trained.reference():
        assert torch.equal(shown(pipe, "sd3"), styled)
    assert torch.equal(shown(pipe, "sd3"), after)
    trained.detach()
    assert torch.equal(shown(pipe, "sd3"), styled)
    assert differences(before, snapshot(pipe)) == []


def test_fused_adapters_and_a_second_of_ours_are_refused(tmp_path):
    pipe = build("sd3")
    trained = attach(pipe, SMALL)
    with pytest.raises(ConfigError, match="already"):
        attach(pipe, SMALL)
    trained.detach()
    attach(build("sd3"), SMALL).save(tmp_path / "a")
    pipe.load_lora_weights(str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="'full'"):
        attach(pipe, AdapterConfig(kind="full"))
    pipe.fuse_lora()
    with pytest.raises(ConfigError, match="unfuse_lora"):
        attach(pipe, SMALL)


def test_denoisers_are_those_that_ran_with_their_numbered_experts():
    pipe = build("wan22")
    seen = adapters.ran(Driver(pipe, **call("wan22")))
    assert set(seen) == {"transformer", "transformer_2"}
    assert list(find_denoisers(pipe)) == ["transformer", "transformer_2"]
    assert list(find_denoisers(pipe, ran=["transformer_2"])) == ["transformer_2", "transformer"]
    assert list(find_denoisers(pipe, ["transformer_2"])) == ["transformer_2"]
    assert adapters.ran(Driver(build("sd_controlnet"), **call("sd_controlnet"))) == ("unet",)


def test_components_outside_the_chain_are_no_denoisers():
    with pytest.raises(ConfigError, match="encoded once"):
        attach(build("sd3"), AdapterConfig(modules=("text_encoder",)))
    with pytest.raises(ConfigError, match="AutoencoderKL"):
        attach(build("sd3"), AdapterConfig(modules=("vae",)))
    with pytest.raises(UnknownName, match="Did you mean 'transformer'"):
        attach(build("sd3"), AdapterConfig(modules=("transfomer",)))


def test_one_of_two_experts_trains_alone(tmp_path):
    pipe = build("wan22")
    trained = attach(pipe, AdapterConfig(rank=2, modules=("transformer_2",)))
    train(trained)
    trained.save(tmp_path / "expert")
    stock = build("wan22")
    stock.load_lora_weights(str(tmp_path / "expert" / "transformer_2"), load_into_transformer_2=True)
    assert torch.equal(shown(stock, "wan22"), shown(pipe, "wan22"))


@pytest.mark.parametrize("name", ALL)
def test_targets_are_the_attention_projections_of_repeated_blocks(name):
    for part, module in find_denoisers(build(name)).items():
        trained = {n.partition(".lora_")[0] for n, _ in attach(build(name), SMALL).named_parameters()}
        linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        expected = {f"{part}.{n}" for n in linear if n.rsplit(".to_", 1)[-1] in ("q", "k", "v", "out.0", "add_out")}
        expected |= {f"{part}.{n}" for n in linear if n.endswith(("add_q_proj", "add_k_proj", "add_v_proj"))}
        assert {n for n in trained if n.startswith(f"{part}.")} == expected


class Plain(nn.Module):
    """Blocks without a word of attention, and a pooler that reads its layers' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 4), "fold": nn.Linear(4, 4)}) for _ in range(2))
        self.seen = nn.ModuleList([nn.MultiheadAttention(4, 1)])
        self.pooler = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        part = {"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4), "mix": nn.Conv2d(4, 4, 1), "wide": nn.Conv2d(4, 4, 3)}
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict(part), "ff": nn.Linear(4, 4)})])


def test_without_attention_every_linear_layer_of_the_blocks_is_a_target():
    found = adapters.targets.find(Plain())
    assert found == ["blocks.0.mix", "blocks.0.fold", "blocks.1.mix", "blocks.1.fold"]


def test_fused_projections_are_attention_and_pointwise_convolutions_are_optional():
    assert adapters.targets.find(Fused()) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    more = adapters.targets.find(Fused(), convolutions=True)
    assert more == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.attn.mix"]


def test_users_name_endings_or_patterns_and_leave_some_out():
    assert adapters.targets.find(Plain(), ["mix", "embed"], ["blocks.0.mix"]) == ["embed", "blocks.1.mix"]
    assert adapters.targets.find(Plain(), [r"blocks\.1\..*"]) == ["blocks.1.mix", "blocks.1.fold"]


def test_what_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'to_q'.*mix \(2\)"):
        adapters.targets.find(Plain(), ["to_q"])
    with pytest.raises(ConfigError, match="exclude holds 'attn'"):
        adapters.targets.find(Plain(), (), ["attn"])
    with pytest.raises(ConfigError, match="no layer to adapt"):
        adapters.targets.find(nn.Sequential(nn.ReLU()))


def test_a_name_that_ends_another_takes_no_adapter_along():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
            self.refiner = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})

    module = Twice()
    adapters.lora.add(module, ADAPTER, ["attn.to_q"], 2, 4)
    assert len(adapters.lora.layers_of(module)) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"targets": ("(",)}, "neither a name ending nor a regular expression"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        AdapterConfig(**settings)


def test_the_settings_read_from_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("kind: full\ntargets: [to_q]\nreference_on: model\n")
    assert configs.read(AdapterConfig, tmp_path / "a.yaml") == AdapterConfig(
        kind="full", targets=("to_q",), reference_on="model"
    )


def test_a_failed_attach_leaves_no_trace(monkeypatch):
    pipe = build("sd3")
    before = snapshot(pipe)
    monkeypatch.setattr(adapters.lora, "first", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(pipe, SMALL)
    assert differences(before, snapshot(pipe)) == []


def test_an_interrupted_save_leaves_the_previous_one(tmp_path, monkeypatch):
    trained = attach(build("sd3"), SMALL)
    trained.save(tmp_path / "lora")
    files = {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}
    assert set(files) == {"adapter.json", "pytorch_lora_weights.safetensors"}
    train(trained)
    with monkeypatch.context() as m:
        m.setattr(adapters.adapter_files, "write_note", _full_disk)
        with pytest.raises(OutputError, match="No space left"):
            trained.save(tmp_path / "lora")
    assert {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()} == files
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
    trained.save(tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes() != files[
        "pytorch_lora_weights.safetensors"
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_saving_never_replaces_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(OutputError, match="holds other files"):
        attach(build("sd3"), SMALL).save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_loading_what_does_not_fit_says_why(tmp_path):
    attach(build("sd3"), SMALL).save(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"'transformer', which StableDiffusionPipeline does not have"):
        adapters.load(build("sd15"), tmp_path / "lora")
    with pytest.raises(DiffalignError, match="does not fit"):
        adapters.load(build("flux"), tmp_path / "lora")
    with pytest.raises(ModelError, match="cannot read"):
        adapters.load(build("sd3"), tmp_path)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan22", "sana"])
def test_gradients_are_equal_with_and_without_checkpointing(name):
    def gradients(on: bool) -> list[torch.Tensor | None]:
        pipe = build(name)
        trained = attach(pipe, SMALL)
        train(trained)
        driver = Driver(pipe, **call(name))
        with checkpointing(trained.denoisers, on):
            driver.predict(driver.start(), 0, grad=True).square().sum().backward()
        assert not any(m.is_gradient_checkpointing for m in trained.denoisers.values())
        return [p.grad for p in trained.parameters()]

    plain, cheap = gradients(False), gradients(True)
    assert any(p is not None and p.any() for p in plain)
    for a, b in zip(plain, cheap, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_denoiser_without_checkpointing_says_so():
    with pytest.raises(ConfigError, match="'plain', a Plain"), checkpointing({"plain": Plain()}):
        pass
    with checkpointing({"plain": Plain()}, on=False):
        pass


def test_compiling_is_in_place_and_undone():
    pipe = build("sd3")
    trained = attach(pipe, SMALL)
    train(trained)
    before, names = shown(pipe, "sd3"), [n for n, _ in trained.named_parameters()]
    with compiled(trained.denoisers, backend="eager"), autocast(trained.denoisers.values(), "bf16"):
        assert torch.isfinite(shown(pipe, "sd3")).all()
    with compiled(trained.denoisers, backend="eager"):
        assert "forward" in vars(pipe.transformer)
        assert [n for n, _ in trained.named_parameters()] == names
        torch.testing.assert_close(shown(pipe, "sd3"), before)
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(shown(pipe, "sd3"), before)


SAVE = """
import sys, torch
from diffalign.train.ema import Ema
from tests.tiny import build
from diffalign.train.adapters import AdapterConfig, attach
attach(build("sd15"), AdapterConfig(rank=2)).save(sys.argv[1])
"""


@pytest.mark.slow
def test_equal_trainings_write_equal_files(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", SAVE, "lora"], check=True, cwd=tmp_path / "there", env=env)
    monkeypatch.chdir(tmp_path)
    attach(build("sd15"), SMALL).save("lora")
    here, there = ({p.name: p.read_bytes() for p in Path(at, "lora").iterdir()} for at in (".", "there"))
    assert here == there


def test_weights_sharded_over_processes_come_and_go_whole(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain = attach(build("sd3"), SMALL)
    train(plain)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = attach(build("sd3"), SMALL)
        fully_shard(sharded.pipe.transformer, mesh=mesh)
        assert all(hasattr(p, "full_tensor") for p in sharded.parameters())
        sharded.load_state_dict(plain.state_dict())
        ema = Ema(sharded.named_parameters(), 0.5, every=1)
        ema.load_state_dict(plain.state_dict())
        ema.update(100)
        for state in (sharded.state_dict(), ema.state_dict()):
            assert [name for name in state if name != BEGUN] == list(plain.state_dict())
            assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
        sharded.save(tmp_path / "lora")
    finally:
        dist.destroy_process_group()
    stock = build("sd3")
    stock.load_lora_weights(str(tmp_path / "lora"))
    assert torch.equal(shown(stock, "sd3"), shown(plain.pipe, "sd3"))
