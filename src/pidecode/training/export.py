# SPDX-License-Identifier: Apache-2.0
"""From a trained network to the file that `PixelDecoder.from_pretrained` loads, or an adapter file beside its base."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from pidecode.errors import FileError, TrainingError
from pidecode.files import atomic_write
from pidecode.training.lora import adapter_tensors, base_tensors
from pidecode.training.methods import Method
from pidecode.training.parallel import World, whole
from pidecode.training.settings import Recipe
from pidecode.weights.identity import Identity, Kind
from pidecode.weights.lora import LoraIdentity, write_lora

_KINDS: dict[str, Kind] = {"backbone": "backbone", "teacher": "teacher", "student": "student", "direct": "student"}


def export_network(recipe: Recipe, method: Method, folder: Path, step: int, here: World) -> Path:
    """Write the network as it stands; every process must call this, the first one writes."""
    net = method.main.net
    tensors: dict[str, Tensor] = {}
    for name, value in net.state_dict().items():
        full = whole(value.detach())
        if here.is_first:
            tensors[name] = full.to("cpu", copy=True).contiguous()
    path = folder / ("adapter.safetensors" if recipe.adapt.rank else "decoder.safetensors")
    if here.is_first:
        try:
            _write(path, recipe, method, tensors, step)
        except FileError as fault:
            raise TrainingError(f"The result could not be written: {fault} The last checkpoint is whole.") from fault
    return path


def _write(path: Path, recipe: Recipe, method: Method, tensors: dict[str, Tensor], step: int) -> None:
    space = None if recipe.space is None else recipe.space.name
    if recipe.adapt.rank:
        identity = LoraIdentity(
            rank=recipe.adapt.rank,
            alpha=recipe.adapt.alpha or recipe.adapt.rank,
            space=space,
            base=recipe.start_from or None,
        )
        write_lora(path, adapter_tensors(tensors), identity)
        return
    kind = _KINDS[recipe.method]
    config = method.main.net.config
    dtype = getattr(torch, recipe.run.export_as)
    content = save(
        {name: tensor.to(dtype).contiguous() for name, tensor in base_tensors(tensors).items()},
        Identity(
            kind=kind,
            config=config,
            space=space,
            times=recipe.distil.times if kind == "student" else (),
            extra={"trained": {"recipe": recipe.title, "steps": step, "started_from": recipe.start_from}},
        ).to_metadata(),
    )
    with atomic_write(path, overwrite=True) as file:
        file.write(content)
