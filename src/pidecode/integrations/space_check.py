# SPDX-License-Identifier: Apache-2.0
"""Is everything here to decode one latent space? Files, shapes, and one small decode, each with its mend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pidecode.color import fidelity
from pidecode.decoder import PixelDecoder
from pidecode.errors import PidecodeError
from pidecode.facts.checkpoints import REPOSITORY
from pidecode.facts.generation import GENERATION
from pidecode.facts.spaces import IMAGE_MODELS, LatentSpace, get_space
from pidecode.latents.encoders import LazyEncoder, SpaceEncoder
from pidecode.latents.latent import FrameWarning, Latent
from pidecode.weights.hub import Hub

_CELLS = 4
"""Rows and columns of the latent that is decoded on trial."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: whether it is well, and what was found or would mend it."""

    what: str
    works: bool
    because: str


def check_space(
    space: str,
    *,
    model: str | None = None,
    variant: str | None = None,
    encoder: str | None = None,
    device: str | torch.device | None = None,
) -> list[Check]:
    """Everything needed to decode one latent space, tried in order; nothing is downloaded.

    model: a decoder's name or file; default the official one of that space.
    encoder: the space's encoder, where it is not where `pidecode pull` puts it.
    Raises SettingError for a space there is not; everything else is a Check.
    """
    row = get_space(space)
    decoder, first = _attempt(
        "decoder",
        lambda: PixelDecoder.from_pretrained(
            model or REPOSITORY, space=row.name, variant=variant, device=device, encoder=encoder
        ),
        lambda made: (
            f"{made.name}, {_millions(made)} in {str(made.dtype).removeprefix('torch.')} on {made.device}; "
            "every tensor in its place"
        ),
    )
    checks = [first]
    if decoder is not None:
        states, more = _check_captions(decoder)
        checks += more
        checks.append(_check_decode(decoder, row, states))
        checks += _check_encoder(decoder, row)
    return [*checks, *_check_pipelines(row)]


def _attempt(what: str, make: Callable[[], Any], tell: Callable[[Any], str]) -> tuple[Any, Check]:
    try:
        made = make()
        return made, Check(what, True, tell(made))
    except PidecodeError as fault:
        return None, Check(what, False, str(fault))


def _millions(decoder: PixelDecoder) -> str:
    return f"{sum(parameter.numel() for parameter in decoder.net.parameters()) / 1e6:.1f} M weights"


def _check_captions(decoder: PixelDecoder) -> tuple[Tensor | None, list[Check]]:
    """States of the empty caption, or zeros in their place, so that the decode can be tried all the same."""
    config = decoder.net.config
    if not config.has_text or decoder.text is None:
        return None, []
    text = decoder.text
    states, check = _attempt("captions", lambda: text.encode(""), lambda made: f"states {list(made.shape)}")
    text.unload()
    return torch.zeros(1, config.text_length, config.text_dim) if states is None else states, [check]


def _check_decode(decoder: PixelDecoder, space: LatentSpace, states: Tensor | None) -> Check:
    noise = torch.randn(1, space.channels, _CELLS, _CELLS, generator=torch.Generator().manual_seed(0))
    settings: Any = {} if states is None else {"caption_states": states}

    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so small a picture is outside the sizes it was trained for
            made = decoder.decode(Latent(noise * 0.5, space.name), output="pt", **settings)
        assert isinstance(made, Tensor)
        return made

    return _attempt("one small decode", run, lambda made: f"{made.shape[-1]}x{made.shape[-2]} pixels, all finite")[1]


def _check_encoder(decoder: PixelDecoder, space: LatentSpace) -> Iterator[Check]:
    encoder = decoder.encoder
    if not isinstance(encoder, LazyEncoder | SpaceEncoder):
        yield Check("encoder", False, f"not on this disk: pidecode pull {space.name}; latents decode without it")
        return
    side = space.fixed_input or 256
    ramp = torch.linspace(-0.9, 0.9, side).expand(1, 3, side, side).clone()
    ramp[:, 1] = ramp[:, 1].transpose(1, 2).clone()

    def run() -> Latent:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FrameWarning)
            return Latent(encoder(ramp), space.name)

    try:
        latent, check = _attempt("encoder", run, lambda made: f"latent {list(made.tensor.shape)}, in the right frame")
    except FrameWarning as doubt:
        latent, check = None, Check("encoder", False, f"it is another space's, or damaged: {doubt}")
    yield check
    if latent is None:
        return
    if not encoder.can_decode:
        yield Check("native decoder", False, "this encoder came without one; only comparing and color_lock need it")
        return
    near = fidelity(encoder.decode_native(latent.tensor).to(ramp), ramp)[0]
    good = near.psnr > 20
    yield Check("native decoder", good, f"{near}" if good else f"there and back gives {near}: check both files")


def _check_pipelines(space: LatentSpace) -> Iterator[Check]:
    if find_spec("diffusers") is None:
        yield Check("pipelines", False, 'diffusers is not installed: pip install "pidecode[diffusers]"')
        return
    import diffusers

    for name, image_model in IMAGE_MODELS.items():
        if image_model.space != space.name:
            continue
        source = GENERATION[name].repository
        if not hasattr(diffusers, image_model.pipeline):
            because = f"diffusers {diffusers.__version__} has no {image_model.pipeline}; upgrade it"
            yield Check(f"pipeline {name}", False, because)
            continue
        there = Hub().cached(source, "model_index.json") is not None
        yield Check(f"pipeline {name}", there, source if there else f"not on this disk: hf download {source}")
