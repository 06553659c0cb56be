from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor

from diffalign import attention
from diffalign.errors import MissingExtra, ModelError, UnknownName
from tests.tiny import build, call

DISPATCHING = ["flux", "qwen_image", "wan21"]
SILENT = ["sd15", "sd3"]


def run(pipe: Any, name: str) -> np.ndarray[Any, Any]:
    made = pipe(**call(name), generator=torch.Generator().manual_seed(0))
    return np.asarray(made[0]) if not isinstance(made[0], list) else np.stack([np.asarray(i) for i in made[0]])


def state(pipe: Any) -> list[Any]:
    found: list[Any] = [_AttentionBackendRegistry.get_active_backend()[0]]
    for model in attention.denoisers(pipe).values():
        found += [(kept.module, kept.processor, kept.backend) for kept in attention._processors(model)]
        found += [dict(model._forward_hooks), dict(model._forward_pre_hooks)]
    return found


@pytest.mark.parametrize("name", DISPATCHING)
def test_a_dispatching_model_runs_on_the_backend_and_is_put_back(name: str) -> None:
    pipe = build(name)
    before, stock, table = state(pipe), run(pipe, name), dict(_AttentionBackendRegistry._backends)
    with attention.attention(pipe, "_native_math"):
        assert np.allclose(run(pipe, name), stock, atol=2)
    assert state(pipe) == before
    assert _AttentionBackendRegistry._backends == table
    assert np.array_equal(run(pipe, name), stock)


@pytest.mark.parametrize("name", SILENT)
def test_a_model_that_ignores_backends_is_an_error_and_left_as_it_was(name: str) -> None:
    pipe = build(name)
    before = state(pipe)
    with pytest.raises(ModelError, match=r"ignores the attention backend '_native_math'.*--attention native"):
        attention.use_attention(pipe, "_native_math")
    assert state(pipe) == before


@pytest.mark.parametrize("name", DISPATCHING + SILENT)
def test_native_works_everywhere_and_changes_nothing(name: str) -> None:
    pipe = build(name)
    stock = run(pipe, name)
    attention.use_attention(pipe, "native")
    assert np.array_equal(run(pipe, name), stock)
    assert not attention.denoisers(pipe).popitem()[1]._forward_hooks


def test_a_setting_that_shows_no_effect_in_the_forward_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("flux")
    before = state(pipe)
    monkeypatch.setattr(type(pipe.transformer), "set_attention_backend", lambda self, backend: None)
    attention.use_attention(pipe, "_native_math")
    with pytest.raises(ModelError, match=r"FluxTransformer2DModel ignores the attention backend '_native_math'"):
        run(pipe, "flux")
    assert state(pipe) == before


def test_a_failing_forward_stops_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("flux")
    table, torch_attention = dict(_AttentionBackendRegistry._backends), torch.nn.functional.scaled_dot_product_attention
    attention.use_attention(pipe, "native")
    with pytest.raises(TypeError):
        pipe.transformer()
    assert _AttentionBackendRegistry._backends == table
    assert torch.nn.functional.scaled_dot_product_attention is torch_attention


def test_a_backend_that_cannot_run_on_this_device_is_an_error_before_the_model_runs() -> None:
    pipe = build("flux")
    before = state(pipe)
    for backend in ("flash", "_native_cudnn"):
        with pytest.raises(
            ModelError, match=f"attention backend '{backend}' does not run here: .*device cpu.*--attention native"
        ):
            attention.use_attention(pipe, backend)
        assert state(pipe) == before


def test_xformers_without_the_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "diffalign\[xformers\]"'):
        attention.use_attention(build("sd15"), "xformers")


def test_xformers_on_a_unet_goes_through_its_own_switch_and_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(query: Any, key: Any, value: Any, **_: Any) -> Any:  # (B heads, tokens, width)
        calls.append(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = stand_in  # type: ignore[attr-defined]
    package = types.ModuleType("xformers")
    package.ops = ops  # type: ignore[attr-defined]
    package.__spec__ = ops.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr("diffusers.models.attention_processor.xformers", package)

    def switch(self: Attention, valid: bool, attention_op: Any = None) -> None:
        if valid:
            self.set_processor(XFormersAttnProcessor())

    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", switch)
    pipe = build("sd15")
    before, stock = state(pipe), run(pipe, "sd15")
    with attention.attention(pipe, "xformers"):
        assert np.allclose(run(pipe, "sd15"), stock, atol=2)
    assert calls
    assert state(pipe) == before


def test_an_unknown_backend_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no attention backend called 'natve'. Did you mean 'native'\?"):
        attention.use_attention(build("sd15"), "natve")
