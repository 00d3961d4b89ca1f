# SPDX-License-Identifier: Apache-2.0
"""Output sizes that checkpoints were trained for, and the advice for others."""

from __future__ import annotations

import pytest

from pidecode.registry.checkpoints import CHECKPOINTS, get_checkpoint, is_trained, size_warning


def test_trained_sizes_give_no_advice() -> None:
    for row in CHECKPOINTS.values():
        for size in row.trained_sizes:
            assert is_trained(row, *size)
            assert size_warning(row, *size) is None
    assert size_warning(get_checkpoint("tiny"), 512, 512) is None


@pytest.mark.parametrize(
    ("checkpoint", "size", "nearest"),
    [
        (("flux", "2k"), (4096, 4096), "2048x2048"), (("flux", "2k"), (1024, 1024), "2048x2048"),
        (("flux", "2k"), (1024, 1792), "1536x2688"), (("flux", "2k"), (3072, 2304), "2304x1728"),
        (("qwenimage",), (8192, 8192), "4096x4096"), (("qwenimage",), (1024, 1024), "2048x2048"),
    ],
)  # fmt: skip
def test_other_sizes_name_the_nearest_in_shape(
    checkpoint: tuple[str, ...], size: tuple[int, int], nearest: str
) -> None:
    advice = size_warning(get_checkpoint(*checkpoint), *size)
    assert advice is not None
    assert f"nearest trained size is {nearest}" in advice


def test_2kto4k_is_trained_for_a_range() -> None:
    row = get_checkpoint("qwenimage")
    for size in ((3072, 3072), (2560, 3584), (4096, 2304)):
        assert is_trained(row, *size)
    for size in ((1024, 1024), (8192, 8192), (1024, 4096), (4608, 3072)):
        assert not is_trained(row, *size)
