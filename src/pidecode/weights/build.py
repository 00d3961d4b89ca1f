# SPDX-License-Identifier: Apache-2.0
"""Tensors -> a network ready to run: built without memory, given its tensors, each held once."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from pidecode.errors import CheckpointError, SettingError
from pidecode.facts.architecture import NetConfig
from pidecode.model.network import PixelNet
from pidecode.weights.shapes import ADAPTER, COLOR_HEAD

_NAMED = 4
"""Tensors named in a message before it only counts."""


def build_network(
    tensors: MutableMapping[str, Tensor],
    config: NetConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    color_head: bool = False,
    source: str = "the file",
) -> PixelNet:
    """A network in evaluation mode, without gradients, whose parameters are these very tensors.

    Tensors leave `tensors` as they are taken, converted one by one where `dtype` or `device` differs, so that
    no more than one is ever held twice; where neither differs, the parameters share the file's own memory.
    color_head: keep the head only training uses, which the tensors must then have. Otherwise it is left out.
    Raises CheckpointError naming missing, unexpected and wrongly shaped tensors, SettingError for a bad dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise SettingError(f"dtype is {dtype}; a network runs in float32, bfloat16 or float16.")
    has_head = any(name.startswith(COLOR_HEAD) for name in tensors)
    if color_head and not (has_head and config.color_head):
        raise CheckpointError(f"{source} has no color head; train one, or do not ask for it.")
    if not color_head:
        config = config.without_color_head()
        for name in [name for name in tensors if name.startswith(COLOR_HEAD)]:
            del tensors[name]
    with torch.device("meta"):
        network = PixelNet(config)
    check_complete(tensors, {name: tuple(p.shape) for name, p in network.state_dict().items()}, source)
    device = torch.device(device)
    taken = {name: _moved(tensors.pop(name), device, dtype) for name in list(tensors)}
    network.load_state_dict(taken, strict=True, assign=True)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if dtype is None and tensor.dtype == torch.float64:
        dtype = torch.float32
    return tensor.to(device=device, dtype=dtype or tensor.dtype)


def check_complete(
    tensors: MutableMapping[str, Tensor], expected: dict[str, tuple[int, ...]], source: str = "the file"
) -> None:
    """Raises CheckpointError unless names and shapes are exactly those expected."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    wrong = [name for name in expected if name in tensors and tuple(tensors[name].shape) != expected[name]]
    faults = []
    adapter = {name for name in expected if name.startswith(ADAPTER)}
    if adapter and adapter <= set(missing):
        faults.append("the adapter is missing, so the picture would ignore the latent")
        missing = [name for name in missing if name not in adapter]
    if missing:
        faults.append(f"missing: {_some(missing)}")
    if unexpected:
        faults.append(f"unexpected: {_some(unexpected)}")
    if wrong:
        name = wrong[0]
        shapes = f"{list(tensors[name].shape)}, expected {list(expected[name])}"
        faults.append(f"wrong shape: {name} is {shapes}{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}")
    if faults:
        raise CheckpointError(
            f"{source} does not fit the network; {'; '.join(faults)}. "
            "Use a complete file of this network, or settings that fit the file."
        )


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more ({len(names)} in all)" if rest > 0 else "")
