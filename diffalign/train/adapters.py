"""What is trained, on any diffusers pipeline: a LoRA or all weights of its denoisers; everything else is frozen.

The start is the base model to the bit: a LoRA's second factor is zero, and a full training starts from the weights as
they are (an autoencoder may round otherwise once frozen: torch picks some kernels by who asks for a gradient). Trained
weights are float32 whatever the model's dtype; a full training of a model in half precision therefore needs autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.restore import adapters_off
from diffalign.train import adapter_files, lora, targets
from diffalign.train.adapter_files import Place, load
from diffalign.train.ema import check_names, fill, held, put, whole
from diffalign.train.targets import find_denoisers, ran

__all__ = [
    "ADAPTER",
    "AdapterConfig",
    "Trained",
    "attach",
    "find_denoisers",
    "load",
    "ran",
]

ADAPTER = "diffalign"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained. A LoRA has no dropout: a replay must give the prediction that the sampling gave."""

    kind: Literal["lora", "full"] = "lora"
    rank: int = 32  # of a LoRA; size and freedom grow with it
    alpha: float | None = None  # the LoRA is scaled by alpha / rank; None is 2 x rank
    targets: tuple[str, ...] = ()  # endings of layer names, or regular expressions; empty: found by structure
    exclude: tuple[str, ...] = ()  # the same, left out again
    convolutions: bool = False  # whether 1x1 convolutions in attention count as layers too
    init: Literal["gaussian", "default"] = "gaussian"  # of a LoRA's first factor; the second is zero
    modules: tuple[str, ...] = ()  # components to train; empty: every denoiser
    seed: int = 0  # of the first factor
    reference_on: Literal["cpu", "model"] = "cpu"  # where a full training keeps its start; the CPU costs copies

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"adapter.rank is {self.rank}, but a LoRA needs at least 1. Usual ranks are 4 to 128.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"adapter.alpha is {self.alpha}, but a LoRA is scaled by alpha / rank: it must be above 0."
            )
        targets.check_patterns(self.targets, "targets")
        targets.check_patterns(self.exclude, "exclude")


class Trained:
    """The weights in training; made by `attach`, undone by `detach`."""

    def __init__(self, pipe: Any, config: AdapterConfig, denoisers: Mapping[str, nn.Module]) -> None:
        self.pipe, self.config, self.denoisers = pipe, config, dict(denoisers)
        parts = {**pipe.components, **self.denoisers}.values()
        self._flags = [(p, p.requires_grad) for m in parts if isinstance(m, nn.Module) for p in m.parameters()]
        self._modes = [(m, m.training) for module in self.denoisers.values() for m in module.modules()]
        self._names: dict[str, list[str]] = {}
        self._start: dict[str, Tensor] = {}  # of a full training: the weights as they were
        self._undo: list[Callable[[], None]] = []
        self._others: list[tuple[Any, list[str]]] = []  # layers with adapters that were on before ours

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, as `component.layer.weight`, in the order of the components and their layers."""
        return [
            (f"{part}.{name.replace(f'.{ADAPTER}.', '.')}", parameter)
            for part, names in self._names.items()
            for name, parameter in _only(self.denoisers[part], names)
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the trained weights, float32, on the CPU."""
        return {
            name: whole(parameter.detach()).to("cpu", torch.float32, copy=True).contiguous()
            for name, parameter in self.named_parameters()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over trained weights; names and shapes must be these."""
        own = dict(self.named_parameters())
        check_names(own, state, "the saved weights")
        for name, parameter in own.items():
            fill(parameter, state[name])

    def reference(self) -> AbstractContextManager[None]:
        """Run a block with the model as it was at the start."""
        return self._without_ours() if self.config.kind == "lora" else self._from_start()

    @property
    def places(self) -> dict[str, Place]:
        """How each component will be saved and loaded."""
        if self.config.kind == "full":
            return {name: Place("from_pretrained", name) for name in self.denoisers}
        return adapter_files.lora_places(self.pipe, self.denoisers)

    def how_to_load(self, folder: str | Path) -> list[str]:
        """The Python lines that load what `save` writes into a stock pipeline `pipe`."""
        return list(dict.fromkeys(place.line(name, str(folder)) for name, place in self.places.items()))

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32, *, main: bool = True) -> Path:
        """Write the weights for stock pipelines, whole or not at all; `dtype` is that of a full training's files.

        Every process calls it where weights are sharded; only the `main` one writes.
        """
        places, full = self.places, self.config.kind == "full"
        weights = {} if full else self._by_component()
        modules = {name: adapter_files.whole_module(module) for name, module in self.denoisers.items() if full}
        if not main:
            return Path(folder)
        with adapter_files.whole_folder(folder) as part:
            if full:
                adapter_files.save_full(modules, places, part, dtype)
            else:
                adapter_files.save_lora(self.pipe, places, weights, part)
            adapter_files.write_note(self.pipe, places, part, str(folder), asdict(self.config))
        return Path(folder)

    def detach(self) -> None:
        """Leave the pipeline as it was before `attach`: no adapter, the start's weights, its flags."""
        while self._undo:
            self._undo.pop()()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, training in self._modes:
            module.training = training
        self._names, self._others = {}, []

    def _by_component(self) -> dict[str, dict[str, Tensor]]:
        state = self.state_dict()
        return {
            part: {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            for part in self.denoisers
        }

    def when_detached(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the pipeline is left as it was, before what was done earlier is undone."""
        self._undo.append(undo)

    def beside(self, layer: Any) -> list[str]:
        """The adapters of a layer that were on before ours."""
        return next((others for each, others in self._others if each is layer), [])

    @contextmanager
    def _without_ours(self) -> Iterator[None]:
        with adapters_off(self.denoisers.values()):
            for layer, others in self._others:
                layer.enable_adapters(enabled=True)
                layer.set_adapter(others)
            try:
                yield
            finally:
                for layer, others in self._others:
                    layer.set_adapter([*others, ADAPTER])

    @contextmanager
    def _from_start(self) -> Iterator[None]:
        kept = dict(self.named_parameters())
        trained = {name: held(parameter) for name, parameter in kept.items()}
        try:
            for name, parameter in kept.items():
                put(parameter, self._start[name].to(parameter.device, parameter.dtype))
            yield
        finally:
            for name, parameter in kept.items():
                put(parameter, trained[name])


def attach(pipe: Any, config: AdapterConfig, denoisers: Mapping[str, nn.Module] | None = None) -> Trained:
    """Freeze the pipeline, put its denoisers into eval mode, and make what `config` asks for trainable in them.

    Make drivers after this: one made before puts the dtypes back that it found.
    """
    parts = dict(denoisers or find_denoisers(pipe, config.modules))
    _refuse(parts, config)
    chosen = {name: _chosen(module, config) for name, module in parts.items()}
    trained = Trained(pipe, config, parts)
    try:
        for parameter, _ in trained._flags:
            parameter.requires_grad_(False)
        for name, module in parts.items():
            module.eval()  # dropout of the base model's own would make a replay differ from its sampling
            make = _attach_lora if config.kind == "lora" else _attach_full
            make(trained, name, chosen[name])
    except BaseException:
        trained.detach()
        raise
    return trained


def _refuse(parts: Mapping[str, nn.Module], config: AdapterConfig) -> None:
    """What would train something else than it seems to."""
    for name, module in parts.items():
        layers = lora.layers_of(module)
        if any(not hasattr(layer, "lora_A") for layer in layers):
            raise ConfigError(
                f"'{name}' carries adapters that are no LoRA, beside which none can be trained. Unload them."
            )
        if any(ADAPTER in layer.lora_A for layer in layers):
            raise ConfigError(f"'{name}' carries the adapter '{ADAPTER}' already. Call detach() on it first.")
        if layers and config.kind == "full":
            raise ConfigError(
                f"adapter.kind is 'full', but '{name}' carries adapters. Fuse and unload them first: pipe.fuse_lora(), "
                "pipe.unload_lora_weights()."
            )
        if any(layer.merged for layer in layers):
            raise ConfigError(
                f"adapters of '{name}' are fused, which shuts out a new one. Call pipe.unfuse_lora() first."
            )


def _chosen(module: nn.Module, config: AdapterConfig) -> list[str]:
    """Layers that take a LoRA, or weights of a full training (all, without targets)."""
    if config.kind == "lora" or config.targets or config.exclude:
        layers = config.targets if config.kind == "lora" else config.targets or (".*",)
        names = targets.find(module, layers, config.exclude, convolutions=config.convolutions)
        if config.kind == "lora":
            return names
        return [n for n, p in module.named_parameters() if n.rpartition(".")[0] in names and p.is_floating_point()]
    return [name for name, p in module.named_parameters() if p.is_floating_point()]


def _attach_full(trained: Trained, part: str, names: list[str]) -> None:
    trained._names[part] = names
    for name, parameter in _only(trained.denoisers[part], names):
        start = parameter.data
        place = "cpu" if trained.config.reference_on == "cpu" else start.device
        kept = trained._start[f"{part}.{name}"] = start.to(place, copy=True)
        parameter.data = start.float()
        parameter.requires_grad_(True)
        trained._undo.append(_putter(parameter, kept))


def _putter(parameter: nn.Parameter, kept: Tensor) -> Callable[[], None]:
    def put_back() -> None:
        parameter.data = kept.to(parameter.device)

    return put_back


def _attach_lora(trained: Trained, part: str, names: list[str]) -> None:
    module, config = trained.denoisers[part], trained.config
    before = lora.state_of(module)
    trained._undo.append(lambda: lora.remove(module, ADAPTER, before))
    lora.add(module, ADAPTER, names, config.rank, config.alpha or 2 * config.rank)
    trained._others += [(layer, others) for layer, others in lora.activate(module, ADAPTER, before) if others]
    trained._names[part] = [name for name, _ in module.named_parameters() if f".{ADAPTER}." in name]
    for name, parameter in _only(module, trained._names[part]):
        parameter.data = lora.first(parameter, f"{part}.{name}", config.init, config.seed)
        parameter.requires_grad_(True)


def _only(module: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    wanted = set(names)
    return ((name, parameter) for name, parameter in module.named_parameters() if name in wanted)
