# SPDX-License-Identifier: Apache-2.0
"""The image encoder that ships with `tiny`: shapes, sizes, settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pidecode.errors import SettingError, SizeError
from pidecode.models.pid.network import PiDNet
from pidecode.models.tiny import EncoderConfig, TinyEncoder, encoder_parameters
from pidecode.training.tiny.decoder_stage import tiny_config

SMALL = EncoderConfig(half_width=8, half_blocks=1, quarter_width=8, quarter_blocks=1, eighth_width=8, eighth_blocks=1)


@pytest.mark.parametrize("size", [(16, 16), (48, 80)])
def test_latents_are_a_sixteenth_a_side(size: tuple[int, int]) -> None:
    encoder = TinyEncoder(SMALL).eval()
    latent = encoder(torch.rand(2, 3, *size) * 2 - 1)
    assert latent.shape == (2, 128, size[0] // 16, size[1] // 16)
    cells = encoder.cells(torch.zeros(1, 3, *size))
    assert cells.shape == (1, 32, size[0] // 8, size[1] // 8)


def test_packed_channels_are_channel_row_column() -> None:
    encoder = TinyEncoder(SMALL).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        packed, cells = encoder(image), encoder.cells(image)
    assert torch.equal(packed[:, 4 * 5 + 2 * 1 + 0], cells[:, 5, 1::2, 0::2])


@pytest.mark.parametrize("shape", [(1, 3, 20, 32), (3, 16, 16), (1, 4, 16, 16), (1, 3, 0, 16)])
def test_other_sizes_are_refused_with_the_mend(shape: tuple[int, ...]) -> None:
    with pytest.raises(SizeError, match="crop it to|takes images"):
        TinyEncoder(SMALL)(torch.zeros(shape))


def test_settings_go_to_a_file_and_back() -> None:
    assert EncoderConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(SettingError, match="Unknown encoder settings depth"):
        EncoderConfig.from_dict({"depth": 3})
    with pytest.raises(SettingError, match="half_width"):
        EncoderConfig(half_width=0)
    assert EncoderConfig.from_dict(replace(SMALL, rounds=3).to_dict()).rounds == 3
    for rounds in (-1, 17):
        with pytest.raises(SettingError, match="rounds"):
            EncoderConfig(rounds=rounds)
    with pytest.raises(SettingError, match="multiple of 4"):
        EncoderConfig(channels=30)


def test_a_latent_is_corrected_by_what_it_still_gets_wrong_for_as_many_rounds_as_it_was_trained() -> None:
    torch.manual_seed(0)
    encoder, image = TinyEncoder(replace(SMALL, rounds=2)).eval(), torch.rand(1, 3, 32, 32)
    seen: list[torch.Tensor] = []

    def look(latent: torch.Tensor) -> torch.Tensor:
        seen.append(latent)
        return torch.full_like(image, 0.25 * len(seen))

    with torch.no_grad():
        first, made = encoder(image), encoder(image, look)
        assert torch.equal(seen[0], first)
        assert len(seen) == 2
        second = encoder.cells(image) + encoder.correction(image, image - 0.25)
        assert torch.equal(seen[1], torch.nn.functional.pixel_unshuffle(second, 2))
        last = second + encoder.correction(image, image - 0.5)
        assert torch.equal(made, torch.nn.functional.pixel_unshuffle(last, 2))
        assert torch.equal(encoder(image, lambda latent: image), first)  # nothing wrong, nothing to correct


def test_the_shipped_shape_fits_its_share_of_the_package() -> None:
    with torch.device("meta"):
        decoder = sum(parameter.numel() for parameter in PiDNet(tiny_config()).parameters())
    assert 2 * (encoder_parameters(EncoderConfig(rounds=4)) + decoder) < 32e6  # float16, with its decoder
