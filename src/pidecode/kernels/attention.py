# SPDX-License-Identifier: Apache-2.0
"""Attention over all tokens: one door to the machine's scaled dot product."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor


def attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v, without a mask, for `[batch, heads, tokens, head_dim]`.

    PiD masks nothing: padded caption positions are attended (SPEC.md section 4).
    """
    return F.scaled_dot_product_attention(q_BNLK, k_BNLK, v_BNLK)
