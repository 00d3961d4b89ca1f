# SPDX-License-Identifier: Apache-2.0
"""`pidecode doctor --space`: try everything that decoding one latent space needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pidecode.cli.common import Check
from pidecode.color_fix import color_drift
from pidecode.decoder import PixelDecoder
from pidecode.encoders.base import ImageEncoder, LazyImageEncoder
from pidecode.errors import PidecodeError
from pidecode.images import DecodeOutput
from pidecode.latents.latent import Latent, NormalizationWarning
from pidecode.registry.checkpoints import CHECKPOINTS, REPOSITORY
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import IMAGE_MODELS, LatentSpace, get_space
from pidecode.weights.resolve import HubCache

BUNDLED = next(row for row in CHECKPOINTS.values() if row.bundled)
TEST_LATENT_SIDE = 4  # rows and columns of the latent that is decoded
MIN_RECONSTRUCTION_PSNR = 20.0  # dB; a VAE that reconstructs a smooth gradient worse has damaged or other weights


def check_space(space: str, *, model: str | None = None, encoder: str | None = None) -> list[Check]:
    """Try everything that decoding one latent space needs, in order; nothing is downloaded.

    Model and encoder are a name or file; by default the official ones, where `pidecode pull` puts them.

    Raises:
        SettingError: There is no such space. Any other fault is a check that failed.
    """
    row = get_space(space)
    decoder, loaded = _attempt(
        "decoder", lambda: PixelDecoder.from_pretrained(model or REPOSITORY, space=row.name, encoder=encoder), _describe
    )
    checks = [loaded]
    if decoder is None and model is None and row.name == BUNDLED.space:
        note = f"the decoder that ships with the package is tried instead; `-m {BUNDLED.variant}` names it"
        decoder, loaded = _attempt(
            "decoder tiny",
            lambda: PixelDecoder.from_pretrained(str(BUNDLED.variant), encoder=encoder),
            lambda tiny: f"{_describe(tiny)}: {note}",
        )
        checks.append(loaded)
    if decoder is not None:
        states, prompt_checks = _check_prompts(decoder)
        checks += [*prompt_checks, _check_decode(decoder, states), *_check_encoder(decoder)]
    return [*checks, *_check_pipelines(row)]


def _attempt(what: str, action: Callable[[], Any], describe: Callable[[Any], str]) -> tuple[Any, Check]:
    try:
        result = action()
        return result, Check(what, True, describe(result))
    except PidecodeError as error:
        return None, Check(what, False, str(error))


def _describe(decoder: PixelDecoder) -> str:
    millions = sum(parameter.numel() for parameter in decoder.net.parameters()) / 1e6
    dtype = str(decoder.dtype).removeprefix("torch.")
    return f"{decoder.name}, {millions:.1f} M weights in {dtype} on {decoder.device}; every tensor is there"


def _check_prompts(decoder: PixelDecoder) -> tuple[Tensor | None, list[Check]]:
    """Text states of the empty prompt, or zeros in their place, so that the decode can be tried without them."""
    text, config = decoder.text, decoder.net.config
    if text is None or not isinstance(config, PiDConfig):
        return None, []
    states, check = _attempt("prompts", lambda: text.encode(""), lambda states: f"states {list(states.shape)}")
    text.unload()
    return torch.zeros(1, config.text_length, config.text_dim) if states is None else states, [check]


def _check_decode(decoder: PixelDecoder, states: Tensor | None) -> Check:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, decoder.space.channels, TEST_LATENT_SIDE, TEST_LATENT_SIDE, generator=generator)

    def decode() -> DecodeOutput:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so small an image is outside the sizes the decoder was trained for
            return decoder.decode(Latent(noise * 0.5, decoder.space.name), prompt_embeds=states)

    def describe(output: DecodeOutput) -> str:
        return f"{output.tensor.shape[-1]}x{output.tensor.shape[-2]} pixels, all finite"

    return _attempt("one small decode", decode, describe)[1]


def _check_encoder(decoder: PixelDecoder) -> Iterator[Check]:
    encoder, space = decoder.encoder, decoder.space
    if not isinstance(encoder, LazyImageEncoder | ImageEncoder):
        yield Check("encoder", False, f"not on this disk: pidecode pull {space.name}; latents decode without it")
        return
    side = space.fixed_input or 256
    gradient = torch.linspace(-0.9, 0.9, side).expand(1, 3, side, side).clone()
    gradient[:, 1] = gradient[:, 1].transpose(1, 2).clone()

    def encode() -> Latent:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NormalizationWarning)
            return Latent(encoder(gradient), space.name)

    try:
        latent, check = _attempt(
            "encoder", encode, lambda latent: f"latent {list(latent.tensor.shape)}, normalized as the space's are"
        )
    except NormalizationWarning as warning:
        latent, check = None, Check("encoder", False, f"it is another space's, or damaged: {warning}")
    yield check
    if latent is None:
        return
    if not encoder.can_decode:
        yield Check("VAE decode", False, "this encoder has no decoder; only comparisons and color_fix need it")
        return
    report = color_drift(encoder.decode(latent.tensor).to(gradient), gradient)[0]
    works = report.psnr > MIN_RECONSTRUCTION_PSNR
    yield Check("VAE decode", works, f"{report}" if works else f"encode and decode give {report}: check both files")


def _check_pipelines(space: LatentSpace) -> Iterator[Check]:
    if find_spec("diffusers") is None:
        yield Check("pipelines", False, 'diffusers is not installed: pip install "pidecode[diffusers]"')
        return
    import diffusers

    for name, image_model in IMAGE_MODELS.items():
        if image_model.space != space.name:
            continue
        if not hasattr(diffusers, image_model.pipeline):
            reason = f"diffusers {diffusers.__version__} has no {image_model.pipeline}; upgrade it"
            yield Check(f"pipeline {name}", False, reason)
            continue
        cached = HubCache().cached(image_model.repository, "model_index.json") is not None
        reason = image_model.repository if cached else f"not on this disk: hf download {image_model.repository}"
        yield Check(f"pipeline {name}", cached, reason)
