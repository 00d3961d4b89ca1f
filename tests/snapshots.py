# SPDX-License-Identifier: Apache-2.0
"""What users see of the options: every `--help` and the OpenAPI document; `python tests/snapshots.py` writes both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

GOLDEN = Path(__file__).parent / "golden"
HELP, OPENAPI = GOLDEN / "help.txt", GOLDEN / "openapi.json"


def help_text() -> str:
    """The help of the command line and of each of its commands, 100 columns wide."""
    from pidecode.cli.app import COMMANDS, cli

    pages = []
    for name in ("", *COMMANDS):
        command = cli if not name else cli.get_command(click.Context(cli), name)
        assert command is not None
        info = "pidecode" if not name else f"pidecode {name}"
        command._help_option = None  # click keeps the option of the first context that asked
        pages.append(
            command.get_help(click.Context(command, info_name=info, terminal_width=100, **cli.context_settings))
        )
    return "\n\n".join(pages) + "\n"


def openapi() -> str:
    """The HTTP interface's own description."""
    sys.path.insert(0, str(Path(__file__).parent / "serving"))
    from serving_kit import small_decoder

    from pidecode.serve.app import create_app
    from pidecode.serve.service import DecodeService

    service = DecodeService({"small": small_decoder()})
    try:
        document = create_app(service).openapi()
    finally:
        service.stop()
    document["info"].pop("version", None)
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    HELP.write_text(help_text(), encoding="utf-8")
    OPENAPI.write_text(openapi(), encoding="utf-8")
