# SPDX-License-Identifier: Apache-2.0
"""Attention backends against the reference implementation, and how one is chosen."""

from __future__ import annotations

import pytest
import torch

from pidecode.errors import SettingError
from pidecode.models import attention as attention_module
from pidecode.models.attention import attention, backend_works, best_backend, reference_attention, use_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [8, 64, 72])
def test_the_default_equals_the_reference(head_dim: int) -> None:
    q, k, v = torch.randn(3, 2, 3, 37, head_dim).unbind(0)
    assert torch.allclose(
        attention(q, k[:, :, :20], v[:, :, :20]), reference_attention(q, k[:, :, :20], v[:, :, :20]), atol=1e-5
    )


@pytest.mark.parametrize("name", ["flash", "math"])
def test_named_backends_equal_the_reference(name: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 64).unbind(0)
    with use_backend(name):
        assert torch.allclose(attention(q, k, v), reference_attention(q, k, v), atol=1e-5)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(SettingError, match="There is no attention backend 'magic'"), use_backend("magic"):
        pass


def test_the_best_that_works_is_chosen() -> None:
    assert best_backend((64, 72), torch.float32, CPU) == "flash"
    assert not backend_works("cudnn", 64, torch.float32, CPU)


def test_a_backend_that_gives_nan_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_module.F.scaled_dot_product_attention

    def faulty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = real(q, k, v)
        return out if attention_module._chosen.get() == "math" else out * float("nan")

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", faulty)
    with pytest.warns(UserWarning, match="has no fast kernel that works"):
        assert best_backend((64,), torch.float32, CPU) == "math"


def test_a_meta_tensor_stands_for_a_streaming_kernel() -> None:
    q = torch.empty(1, 2, 10, 8, device="meta")
    assert attention(q, q, q).shape == q.shape
