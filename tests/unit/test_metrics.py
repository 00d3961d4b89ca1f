# SPDX-License-Identifier: Apache-2.0
"""Image metrics against values worked out elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pidecode.errors import SizeError
from pidecode.metrics import channel_error, psnr, sharpness, ssim


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = torch.stack((a[0] + 0.2, a[1]))  # 0.1 of the unit range: 20 dB; and none at all
    assert psnr(b, a)[0].item() == pytest.approx(20.0, abs=1e-5)
    assert psnr(b, a)[1] > 100


def test_ssim_agrees_with_scikit_image() -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=generator), size=(64, 48), mode="bicubic")
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    a = a.clamp(0, 1)
    expected, full = structural_similarity(
        *(x[0].permute(1, 2, 0).double().numpy() for x in (a, b)), channel_axis=2, data_range=1.0,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True,
    )  # fmt: skip
    inner = np.asarray(full)[5:-5, 5:-5].mean()  # it pads; we leave the border out
    assert ssim(a * 2 - 1, b * 2 - 1).item() == pytest.approx(float(inner), abs=1e-6)
    assert ssim(a, a).item() == pytest.approx(1.0)
    assert expected < 1


def test_channel_error_is_signed_and_in_steps_of_255() -> None:
    a = torch.zeros(1, 3, 12, 12)
    b = a.clone()
    b[:, 2] += 2 / 255
    assert channel_error(b, a)[0].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-5)


def test_sharpness_grows_with_edges() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    edge = flat.clone()
    edge[..., 8:] = 1
    assert sharpness(flat).item() == 0
    assert sharpness(edge) > 0


def test_images_of_other_shapes_are_refused() -> None:
    with pytest.raises(SizeError, match="two of one"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(SizeError, match="at least 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
