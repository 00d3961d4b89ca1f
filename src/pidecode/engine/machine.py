# SPDX-License-Identifier: Apache-2.0
"""What a decode may use of a machine, the chunk sizes that suit it, and the constants that memory plans share."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pidecode.errors import SettingError

if TYPE_CHECKING:
    import torch

GB = 10**9
DRIVER = 450_000_000  # what an accelerator's context and kernels take besides tensors (the usual 0.3 to 0.5 GB)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Quantization = Literal["none", "int8", "fp8"]  # format that the weights of large linear layers are stored in
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a decode may use."""

    memory: int  # bytes free on the device
    accelerator: bool = True  # its memory is not the host's: modules can be offloaded, and a driver takes its share
    w8a8: tuple[Quantization, ...] = ()  # formats it multiplies in eight bits, the best first


@dataclass(frozen=True, slots=True)
class Chunks:
    """What one evaluation works on at once; the default suits a CPU's caches. No size changes more than rounding."""

    tokens: int = 512  # patch tokens that pass through a patch block's linear layers together
    tile_tokens: int = 256  # patch tokens of a tile of the pixel blocks; rounded to whole rows of patches
    tile_rows: int = 1  # pixel rows, within each of those patches, of such a tile
    keep_modulation: bool = False  # keep the pixel blocks' modulation, cut to these tiles, for all steps and images

    @classmethod
    def large(cls, patch_size: int) -> Chunks:
        """Few, large matrix products, as suits accelerators."""
        return cls(tokens=4096, tile_tokens=2048, tile_rows=max(1, patch_size // 4))

    @classmethod
    def whole(cls, patch_size: int) -> Chunks:
        """Whole images at once, up to 4096 x 4096 pixels: the fewest launches, and the most memory."""
        return cls(tokens=65536, tile_tokens=65536, tile_rows=patch_size, keep_modulation=True)


def this_machine(device: str | torch.device | None = None) -> Machine:
    """What a decode may use now on a device; by default the best there is.

    Raises:
        SettingError: The device is not there, or does not say how much memory is free.
    """
    # These load torch, which importing this module must not.
    from pidecode.devices import default_dtype, free_memory, select_device
    from pidecode.engine.ops.quantize import STORED, require_products

    chosen = select_device(device)
    free = free_memory(chosen)
    if free is None:
        raise SettingError(f"{chosen} does not say how much memory is free; name an amount.")
    w8a8: list[Quantization] = []
    for format in STORED:
        with suppress(SettingError):
            require_products(format, default_dtype(chosen), chosen)
            w8a8.append(format)
    return Machine(memory=free, accelerator=chosen.type != "cpu", w8a8=tuple(w8a8))
