# SPDX-License-Identifier: Apache-2.0
"""The image encoder that ships with `tiny`: shapes, sizes, settings."""

from __future__ import annotations

import pytest
import torch

from pidecode.errors import SettingError, SizeError
from pidecode.model.encoder import EncoderConfig, ImageEncoder, encoder_parameters

SMALL = EncoderConfig(half_width=8, half_blocks=1, quarter_width=8, quarter_blocks=1, eighth_width=8, eighth_blocks=1)


@pytest.mark.parametrize("size", [(16, 16), (48, 80)])
def test_latents_are_a_sixteenth_a_side(size: tuple[int, int]) -> None:
    encoder = ImageEncoder(SMALL).eval()
    latent = encoder(torch.rand(2, 3, *size) * 2 - 1)
    assert latent.shape == (2, 128, size[0] // 16, size[1] // 16)
    cells = encoder.cells(torch.zeros(1, 3, *size))
    assert cells.shape == (1, 32, size[0] // 8, size[1] // 8)


def test_packed_channels_are_channel_row_column() -> None:
    encoder = ImageEncoder(SMALL).eval()
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        packed, cells = encoder(picture), encoder.cells(picture)
    assert torch.equal(packed[:, 4 * 5 + 2 * 1 + 0], cells[:, 5, 1::2, 0::2])


@pytest.mark.parametrize("shape", [(1, 3, 20, 32), (3, 16, 16), (1, 4, 16, 16), (1, 3, 0, 16)])
def test_other_sizes_are_refused_with_the_mend(shape: tuple[int, ...]) -> None:
    with pytest.raises(SizeError, match="crop it to|takes pictures"):
        ImageEncoder(SMALL)(torch.zeros(shape))


def test_settings_go_to_a_file_and_back() -> None:
    assert EncoderConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(SettingError, match="Unknown encoder settings depth"):
        EncoderConfig.from_dict({"depth": 3})
    with pytest.raises(SettingError, match="half_width"):
        EncoderConfig(half_width=0)
    with pytest.raises(SettingError, match="multiple of 4"):
        EncoderConfig(channels=30)


def test_the_shipped_shape_fits_its_share_of_the_package() -> None:
    assert 2 * encoder_parameters(EncoderConfig()) < 6e6
