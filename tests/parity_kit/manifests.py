# SPDX-License-Identifier: Apache-2.0
"""Full-size manifests: every released configuration, on the meta device, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from parity_kit.files import Comparison, config_from_reference
from pidecode.models.pid.network import PiDNet
from pidecode.training.dmd import Discriminator

ManifestCheck = Callable[[Path], Iterator[Comparison]]


def check_for(path: Path) -> ManifestCheck | None:
    """The check for a manifest's class, or None if this project has no such network."""
    kind = json.loads(path.read_text())["class"]
    if kind == "Discriminator_ImageDiT":
        return discriminator
    return network if kind in ("PidNet", "PixDiT_T2I") else None


def discriminator(path: Path) -> Iterator[Comparison]:
    """The released discriminator, tensor by tensor."""
    args = (manifest := json.loads(path.read_text()))["constructor_args"]
    with torch.device("meta"):
        module = Discriminator(
            args["inner_dim"],
            args["num_blocks"],
            tuple(args["feature_indices"]),
            layers=args["num_conv_layers"],
            per_patch=args["patch_logits"],
        )
    yield from same_tensors({name: list(value.shape) for name, value in module.state_dict().items()}, manifest)


def network(path: Path) -> Iterator[Comparison]:
    """Names, shapes and the parameter count. Recorded as 0 differences of 0 expected."""
    manifest = json.loads(path.read_text())
    config = config_from_reference(manifest["constructor_args"], bare=manifest["class"] != "PidNet")
    with torch.device("meta"):
        net = PiDNet(config)
    ours = {name: list(value.shape) for name, value in net.state_dict().items()}
    yield from same_tensors(ours, manifest)


def same_tensors(ours: dict[str, list[int]], manifest: dict[str, object]) -> Iterator[Comparison]:
    """Count of differing names or shapes, and the parameter count."""
    theirs = manifest["state_dict"]
    assert isinstance(theirs, dict)
    differing = [name for name in set(ours) | set(theirs) if ours.get(name) != theirs.get(name)]
    count = sum(torch.Size(shape).numel() for shape in ours.values())
    yield Comparison("differing tensors", torch.tensor(len(differing)), torch.tensor(0), 0.0)
    yield Comparison("parameters", torch.tensor(count), torch.tensor(manifest["parameter_count"]), 0.0)
