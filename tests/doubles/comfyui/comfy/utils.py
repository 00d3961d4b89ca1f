# SPDX-License-Identifier: Apache-2.0
"""The progress bar, which calls a hook at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROGRESS_BAR_HOOK: Callable[..., None] | None = None


def set_progress_bar_global_hook(function: Callable[..., None] | None) -> None:
    global PROGRESS_BAR_HOOK  # noqa: PLW0603 - as in ComfyUI
    PROGRESS_BAR_HOOK = function


class ProgressBar:
    """Counts to `total`."""

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total, self.node_id, self.hook = total, node_id, PROGRESS_BAR_HOOK

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        if self.hook is not None:
            self.hook(value, total, preview, node_id=self.node_id)
