# SPDX-License-Identifier: Apache-2.0
"""Which node runs now."""

from __future__ import annotations

from types import SimpleNamespace


def get_executing_context() -> SimpleNamespace:
    return SimpleNamespace(prompt_id="1", node_id="7", list_index=0)
