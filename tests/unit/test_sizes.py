# SPDX-License-Identifier: Apache-2.0
"""Sizes of latents, images and outputs."""

from __future__ import annotations

import pytest

from pidecode.errors import SizeError
from pidecode.registry.checkpoints import (
    CHECKPOINTS,
    check_output_size,
    get_checkpoint,
    input_size,
    is_trained,
    latent_grid,
    nearest_trained,
    output_size,
    size_warning,
)
from pidecode.registry.spaces import SPACES


@pytest.mark.parametrize(
    ("space", "grid", "expected"),
    [
        ("flux", (64, 64), (2048, 2048)), ("sdxl", (128, 96), (4096, 3072)), ("flux2", (32, 24), (2048, 1536)),
        ("dinov2", (32, 32), (2048, 2048)), ("siglip", (16, 16), (2048, 2048)),
    ],
)  # fmt: skip
def test_output_size_and_back(space: str, grid: tuple[int, int], expected: tuple[int, int]) -> None:
    assert output_size(space, *grid) == expected
    assert latent_grid(space, *expected) == grid
    side = SPACES[space].scale
    assert input_size(space, *expected) == (expected[0] // side, expected[1] // side)


def test_sizes_that_do_not_divide_name_the_nearest() -> None:
    with pytest.raises(SizeError, match=r"multiples of 64. The nearest is 2048x1536"):
        check_output_size("flux", 2060, 1530)
    with pytest.raises(SizeError, match="nearest is 64x64"):
        check_output_size("flux", 1, 64)
    with pytest.raises(SizeError, match="always gives 2048x2048"):
        latent_grid("siglip", 1024, 1024)
    with pytest.raises(SizeError, match="at least one cell"):
        output_size("flux", 0, 4)


def test_trained_sizes_can_be_had() -> None:
    for row in CHECKPOINTS.values():
        for height, width in row.trained_sizes:
            if row.latent_space is not None:
                check_output_size(row.space, height, width)
            assert is_trained(row, height, width)
            assert size_warning(row, height, width) is None


def test_2k_is_trained_for_its_list_only() -> None:
    row = get_checkpoint("flux", "2k")
    assert not is_trained(row, 4096, 4096)
    assert nearest_trained(row, 4096, 4096) == (2048, 2048)
    assert nearest_trained(row, 1024, 1792) == (1536, 2688)
    assert nearest_trained(row, 3072, 2304) == (2304, 1728)
    advice = size_warning(row, 1024, 1024)
    assert advice is not None
    assert "nearest trained size is 2048x2048" in advice


def test_2kto4k_is_trained_for_a_range() -> None:
    row = get_checkpoint("qwenimage")
    for size in ((3072, 3072), (2560, 3584), (4096, 2304)):
        assert is_trained(row, *size)
    for size in ((1024, 1024), (8192, 8192), (1024, 4096), (4608, 3072)):
        assert not is_trained(row, *size)
    assert nearest_trained(row, 8192, 8192) == (4096, 4096)
    assert nearest_trained(row, 1024, 1024) == (2048, 2048)
    assert nearest_trained(row, 3072, 3072) == (3072, 3072)


def test_tiny_gives_no_advice() -> None:
    tiny = get_checkpoint("tiny")
    assert is_trained(tiny, 512, 512)
    assert nearest_trained(tiny, 512, 512) is None


def test_no_image() -> None:
    with pytest.raises(SizeError, match="positive sides"):
        nearest_trained(get_checkpoint("flux"), 0, 10)
