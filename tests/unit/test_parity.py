# SPDX-License-Identifier: Apache-2.0
"""The golden tensors shipped with the tests agree, quantity by quantity."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import parity
from parity_kit.files import Case, Comparison, read_cases

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
CASES = [case for path in sorted(GOLDEN.glob("*.safetensors")) for case in read_cases(path)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file.split('.')[0]}-{case.name}")
def test_golden_case(case: Case) -> None:
    comparisons = list(parity.CHECKS[case.kind](case))
    assert comparisons, "a case without a quantity proves nothing"
    wrong = [f"{c.name}: abs {c.errors[0]:.2e} rel {c.errors[1]:.2e}" for c in comparisons if not c.agrees]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_value_is_seen() -> None:
    right = torch.zeros(3)
    assert Comparison("same", right, right, 1e-6).agrees
    assert not Comparison("off", right + 1e-4, right, 1e-6).agrees
    assert not Comparison("nan", right + float("nan"), right, 1e-6).agrees
    assert not Comparison("shape", right[:2], right, 1e-6).agrees


def test_an_unknown_kind_is_listed_never_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(parity.CHECKS, "temb")
    monkeypatch.setattr(parity, "CHECKS", {"rope_apply": parity.CHECKS["rope_apply"]})
    done, unbuilt = parity.check_folder(GOLDEN)
    assert {case for _, case, _ in done} == {"rope_apply", "manifest"}
    assert "tables.safetensors timestep (temb)" in unbuilt
