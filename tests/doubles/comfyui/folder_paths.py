# SPDX-License-Identifier: Apache-2.0
"""Folders of models by kind."""

from __future__ import annotations

from pathlib import Path

folders: dict[str, Path] = {}


def get_filename_list(kind: str) -> list[str]:
    return sorted(path.name for path in folders[kind].iterdir()) if kind in folders else []


def get_full_path_or_raise(kind: str, name: str) -> str:
    path = folders.get(kind, Path("models") / kind) / name
    if not path.is_file():
        raise FileNotFoundError(f"Model in folder '{kind}' with filename '{name}' not found.")
    return str(path)
