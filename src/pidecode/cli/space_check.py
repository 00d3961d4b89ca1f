# SPDX-License-Identifier: Apache-2.0
"""`pidecode doctor --space`: try everything that decoding one latent space needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from pidecode.cli.common import Check
from pidecode.color_fix import color_drift
from pidecode.decoder import PixelDecoder
from pidecode.encoders.base import ImageEncoder, LazyImageEncoder
from pidecode.errors import PidecodeError
from pidecode.latents.latent import Latent, NormalizationWarning
from pidecode.registry.checkpoints import CHECKPOINTS, REPOSITORY
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import IMAGE_MODELS, LatentSpace, get_space
from pidecode.weights.resolve import HubCache

BUNDLED = next(row for row in CHECKPOINTS.values() if row.bundled)
TEST_LATENT_SIDE = 4  # rows and columns of the latent that is decoded
MIN_RECONSTRUCTION_PSNR = 20.0  # dB; a VAE that reconstructs a smooth gradient worse has damaged or other weights


class _Checks(list[Check]):
    """What was tried, in order."""

    def add(self, name: str, ok: bool, reason: str) -> None:
        """Note one check."""
        self.append(Check(name, ok, reason))

    @contextmanager
    def failing(self, name: str) -> Iterator[None]:
        """Note an error of ours as a check that failed."""
        try:
            yield
        except PidecodeError as error:
            self.add(name, False, str(error))


def check_space(space: str, *, model: str | None = None, encoder: str | None = None) -> list[Check]:
    """Try everything that decoding one latent space needs, in order; nothing is downloaded.

    Model and encoder are a name or file; by default the official ones, where `pidecode pull` puts them.

    Raises:
        SettingError: There is no such space. Any other fault is a check that failed.
    """
    row, checks, decoder = get_space(space), _Checks(), None
    with checks.failing("decoder"):
        decoder = PixelDecoder.from_pretrained(model or REPOSITORY, space=row.name, encoder=encoder)
        checks.add("decoder", True, _describe(decoder))
    if decoder is None and model is None and row.name == BUNDLED.space:
        note = f"the decoder that ships with the package is tried instead; `-m {BUNDLED.variant}` names it"
        with checks.failing("decoder tiny"):
            decoder = PixelDecoder.from_pretrained(str(BUNDLED.variant), encoder=encoder)
            checks.add("decoder tiny", True, f"{_describe(decoder)}: {note}")
    if decoder is not None:
        _check_decode(checks, decoder)
        _check_encoder(checks, decoder)
    _check_pipelines(checks, row)
    return checks


def _describe(decoder: PixelDecoder) -> str:
    millions = sum(parameter.numel() for parameter in decoder.net.parameters()) / 1e6
    dtype = str(decoder.dtype).removeprefix("torch.")
    return f"{decoder.name}, {millions:.1f} M weights in {dtype} on {decoder.device}; every tensor is there"


def _check_decode(checks: _Checks, decoder: PixelDecoder) -> None:
    """Encode the empty prompt, for decoders that read text, and decode noise."""
    states, text, config = None, decoder.text, decoder.net.config
    if text is not None and isinstance(config, PiDConfig):
        states = torch.zeros(1, config.text_length, config.text_dim)  # with which the decode is tried in any case
        with checks.failing("prompts"):
            states = text.encode("")
            checks.add("prompts", True, f"states {list(states.shape)}")
        text.unload()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, decoder.space.channels, TEST_LATENT_SIDE, TEST_LATENT_SIDE, generator=generator)
    with checks.failing("one small decode"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so small an image is outside the sizes the decoder was trained for
        height, width = decoder.decode(Latent(noise * 0.5, decoder.space.name), prompt_embeds=states).tensor.shape[-2:]
        checks.add("one small decode", True, f"{width}x{height} pixels, all finite")


def _check_encoder(checks: _Checks, decoder: PixelDecoder) -> None:
    """Encode a smooth gradient, and decode it by the VAE itself."""
    encoder, space, latent = decoder.encoder, decoder.space, None
    if not isinstance(encoder, LazyImageEncoder | ImageEncoder):
        checks.add("encoder", False, f"not on this disk: pidecode pull {space.name}; latents decode without it")
        return
    side = space.fixed_input or 256
    gradient = torch.linspace(-0.9, 0.9, side).expand(1, 3, side, side).clone()
    gradient[:, 1] = gradient[:, 1].transpose(1, 2).clone()
    try:
        with checks.failing("encoder"), warnings.catch_warnings():
            warnings.simplefilter("error", NormalizationWarning)
            latent = Latent(encoder(gradient), space.name)
            checks.add("encoder", True, f"latent {list(latent.tensor.shape)}, normalized as the space's are")
    except NormalizationWarning as warning:
        checks.add("encoder", False, f"it is another space's, or damaged: {warning}")
    if latent is None:
        return
    if not encoder.can_decode:
        checks.add("VAE decode", False, "this encoder has no decoder; only comparisons and color_fix need it")
        return
    report = color_drift(encoder.decode(latent.tensor).to(gradient), gradient)[0]
    works = report.psnr > MIN_RECONSTRUCTION_PSNR
    checks.add("VAE decode", works, f"{report}" if works else f"encode and decode give {report}: check both files")


def _check_pipelines(checks: _Checks, space: LatentSpace) -> None:
    if find_spec("diffusers") is None:
        checks.add("pipelines", False, 'diffusers is not installed: pip install "pidecode[diffusers]"')
        return
    import diffusers

    for name, image_model in IMAGE_MODELS.items():
        if image_model.space != space.name:
            continue
        repository = image_model.repository
        cached = HubCache().cached(repository, "model_index.json") is not None
        reason = repository if cached else f"not on this disk: hf download {repository}"
        if not hasattr(diffusers, image_model.pipeline):
            cached, reason = False, f"diffusers {diffusers.__version__} has no {image_model.pipeline}; upgrade it"
        checks.add(f"pipeline {name}", cached, reason)
