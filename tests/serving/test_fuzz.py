# SPDX-License-Identifier: Apache-2.0
"""The server fuzzed with schemathesis from its OpenAPI document (`-m slow`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving_kit import LIMITS, running, small_decoder

from pidecode.serve.app import create_app
from pidecode.serve.service import DecodeService

pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")

EXAMPLES = os.environ.get("PIDECODE_FUZZ_EXAMPLES", "5")
# Server errors are counted below: 501 is right for a server without a text-to-image pipeline.
CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    with running(create_app(service), service) as served:
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json",
            "--checks", CHECKS, "--max-examples", EXAMPLES, "--phases", "examples,coverage,fuzzing",
            "--seed", "7", "--workers", "1", "--request-timeout", "60", "--suppress-health-check", "all",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert served.get("/health").json()["status"] == "ok"
        text = served.get("/metrics").body.decode()
    assert set(re.findall(r'status="(5\d\d)"', text)) <= {"501"}, text
    assert len(re.findall(r'status="200"', text)) >= 4  # some requests were valid
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
