# SPDX-License-Identifier: Apache-2.0
"""The server, which shows a text on a node."""

from __future__ import annotations


class PromptServer:
    instance: PromptServer

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.texts.append((text, node_id))


PromptServer.instance = PromptServer()
