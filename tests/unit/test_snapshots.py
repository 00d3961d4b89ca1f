# SPDX-License-Identifier: Apache-2.0
"""Help pages and the OpenAPI document change on purpose only: `python tests/snapshots.py` records a change."""

from __future__ import annotations

import pytest

import snapshots


def test_help_pages_are_those_recorded() -> None:
    assert snapshots.help_text() == snapshots.HELP.read_text(encoding="utf-8")


def test_the_http_interface_is_the_one_recorded() -> None:
    pytest.importorskip("fastapi")
    assert snapshots.openapi() == snapshots.OPENAPI.read_text(encoding="utf-8")
