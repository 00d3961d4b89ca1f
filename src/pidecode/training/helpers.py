# SPDX-License-Identifier: Apache-2.0
"""Encoders a run needs beside the network: pictures to latents, captions to states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pidecode.captions import CaptionStates, TextEncoder, default_folder
from pidecode.errors import TrainingError
from pidecode.training.feed import Helpers
from pidecode.training.latent_shards import LatentShards
from pidecode.training.settings import Encode, EncodeText, Recipe
from pidecode.weights.locate import asset, encoder_path


def make_helpers(recipe: Recipe, device: torch.device) -> Helpers:
    """The recipe's own encoders, or the latent space's and Gemma-2; latents are kept where `data.cache` says."""
    encode_text: EncodeText | None = None
    if recipe.net.has_text:
        encode_text = recipe.encode_text or TextEncoder(device=device, states=CaptionStates(default_folder())).encode
    if recipe.space is None:
        return Helpers(None, encode_text)
    source, encode = _encoder(recipe, device)
    cache = LatentShards(recipe.data.cache, f"{recipe.space.name}/{source}") if recipe.data.cache else None
    return Helpers(encode, encode_text, cache)


def _encoder(recipe: Recipe, device: torch.device) -> tuple[str, Encode]:
    """The encoder, and a name that tells it from others in the cache."""
    space = recipe.space
    assert space is not None
    if recipe.encode is not None:
        made_by: Callable[..., Tensor] = recipe.encode
        return getattr(made_by, "__qualname__", type(made_by).__qualname__), recipe.encode
    path = recipe.data.encoder or encoder_path(space.name)
    if not path and space.name == "flux2":
        path = asset("tiny_encoder.safetensors")
    if not path:
        raise TrainingError(
            f"The encoder of space {space.name!r} is not on this disk; `pidecode pull {space.name}` fetches it, or "
            "set data.encoder to its file or folder."
        )
    from pidecode.latents.encoders import load_encoder

    encoder = load_encoder(space.name, path, device=device)
    return str(path), encoder


class ByteStates:
    """A stand-in for a language model: a fixed random vector for each byte of a caption.

    Enough for dry runs, tests and small networks that learn their own reading of words; needs nothing downloaded.
    """

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width
        chance = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"bytes").digest()[:7], "little"))
        self._table = torch.randn(257, width, generator=chance)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """States `[B, length, width]`; shorter captions are filled up with one more vector."""
        rows = torch.full((len(captions), self.length), 256)
        for row, caption in zip(rows, captions, strict=True):
            data = list(caption.encode("utf-8"))[: self.length]
            row[: len(data)] = torch.tensor(data, dtype=torch.long)
        return self._table[rows]
