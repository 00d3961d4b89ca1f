# SPDX-License-Identifier: Apache-2.0
"""Decoders give what they gave when their outputs were recorded: to the bit on the same instruction set."""

from __future__ import annotations

import torch

import recorded


def test_outputs_are_those_recorded() -> None:
    digests, samples = recorded.read()
    made = recorded.outputs()
    assert set(made) == set(samples)
    same_machine = digests["machine"] == recorded.machine()
    for name, value in made.items():
        if same_machine:
            assert recorded.digest(value) == digests[name], name
        else:
            torch.testing.assert_close(recorded.samples(value), samples[name], atol=2e-3, rtol=1e-3, msg=name)
