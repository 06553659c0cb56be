"""Another LoRA in the denoisers that train: frozen and off, but for blocks that run with it in place of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from diffalign.errors import ConfigError
from diffalign.restore import adapters_off
from diffalign.train import adapter_files, lora
from diffalign.train.adapters import Trained


class Carried:
    """What an earlier training saved, beside what trains now; it goes when that is detached."""

    def __init__(self, trained: Trained, folder: str | Path, name: str) -> None:
        if trained.config.kind != "lora":
            raise ConfigError(f"adapter.kind is '{trained.config.kind}', beside which no LoRA is carried. Use lora.")
        note = Path(folder) / adapter_files.NOTE
        if not note.is_file():
            raise ConfigError(f"'{folder}' has no {note.name}. Give the folder OUT/lora of a training here.")
        self.trained, self.name = trained, name
        modules = trained.denoisers.values()
        before = {module: lora.state_of(module) for module in modules}
        flags = {p: p.requires_grad for module in modules for p in module.parameters()}
        for module, told in before.items():
            trained.when_detached(partial(lora.remove, module, name, told))
        adapter_files.load(trained.pipe, folder, name)
        if not any(name in layer.lora_A for module in modules for layer in lora.layers_of(module)):
            raise ConfigError(f"'{folder}' holds no LoRA of {', '.join(trained.denoisers)}.")
        for told in before.values():
            for layer, off, active in told.switches:
                layer.set_adapter(active)
                layer.enable_adapters(enabled=not off)
        known = {layer for told in before.values() for layer, _, _ in told.switches}
        for module in modules:
            for layer in lora.layers_of(module):
                if layer not in known:
                    layer.set_adapter([])
            for parameter in module.parameters():
                parameter.requires_grad_(flags.get(parameter, False))

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Run a block with the base model and this LoRA, without ours."""
        modules = self.trained.denoisers.values()
        before = [(layer, list(layer.active_adapters)) for module in modules for layer in lora.layers_of(module)]
        with adapters_off(modules):
            for layer, active in before:
                others = [each for each in active if each in self.trained.beside(layer)]
                layer.enable_adapters(enabled=True)
                layer.set_adapter([*others, *([self.name] if self.name in layer.lora_A else [])])
            try:
                yield
            finally:
                for layer, active in before:
                    layer.set_adapter(active)
