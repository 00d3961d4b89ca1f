# SPDX-License-Identifier: Apache-2.0
"""What a node returns for an output that must not be used."""

from __future__ import annotations


class ExecutionBlocker:
    """Stops the nodes it reaches, and shows its message on them."""

    def __init__(self, message: str | None) -> None:
        self.message = message
