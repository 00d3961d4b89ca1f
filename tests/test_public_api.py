# SPDX-License-Identifier: Apache-2.0
"""The public names are these, each resolves, and importing the package loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pidecode
from pidecode.cli.app import COMMANDS

HEAVY = {"torch", "numpy", "PIL", "safetensors", "huggingface_hub", "diffusers", "transformers", "tqdm"}


def modules_after(code: str) -> set[str]:
    """Top-level names that a fresh interpreter has imported once it has run `code`."""
    probe = f"{code}\nimport sys, json; print('@' + json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.rsplit("@", 1)[1]))


def test_the_public_names_are_exactly_these() -> None:
    assert pidecode.__all__ == [
        "DecodeOptions", "DecodeOutput", "Latent", "PidecodeError", "PixelDecoder", "RuntimeOptions", "__version__",
        "attach", "errors", "latent_from_pipeline", "list_checkpoints", "list_spaces", "pid_blocks", "plan_decode",
        "read_image", "read_metadata", "save_image", "this_machine",
    ]  # fmt: skip
    assert dir(pidecode) == sorted(pidecode.__all__)


@pytest.mark.parametrize("name", pidecode.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(pidecode, name) is not None


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="no attribute 'decoed'; it has DecodeOptions, "):
        pidecode.decoed  # noqa: B018


def test_the_commands_are_exactly_these() -> None:
    assert list(COMMANDS) == [
        "upscale",
        "decode",
        "batch",
        "generate",
        "web",
        "serve",
        "models",
        "pull",
        "captions",
        "convert",
        "info",
        "train",
        "plan",
        "doctor",
    ]


@pytest.mark.parametrize(
    "code",
    [
        "import pidecode",
        "import pidecode; pidecode.errors.PidecodeError",
        "from pidecode.cli.app import cli; cli(['--help'], standalone_mode=False)",
        "from pidecode.cli.app import cli; cli(['models'], standalone_mode=False)",
        "from pidecode.cli.app import cli; cli(['models', '--help'], standalone_mode=False)",
    ],
)
def test_importing_is_light(code: str) -> None:
    # Listing what is on this disk asks the hub's library where its cache is.
    allowed = {"huggingface_hub", "tqdm"} if code.endswith("models'], standalone_mode=False)") else set()
    assert modules_after(code) & (HEAVY - allowed) == set()


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "pidecode", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pidecode, version {pidecode.__version__}\n"
