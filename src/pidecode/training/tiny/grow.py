# SPDX-License-Identifier: Apache-2.0
"""From a trained regressor to a deeper one that gives the same picture, to be trained on."""

from __future__ import annotations

import torch

from pidecode.errors import SettingError
from pidecode.facts.architecture import NetConfig
from pidecode.training.tiny.regressor import Regressor


@torch.no_grad()
def grown(regressor: Regressor, config: NetConfig) -> Regressor:
    """A regressor of `config`, which has the same widths and at least as many blocks; the new ones are the identity.

    New blocks come last at each level, and at the finest one in the middle and last, so that a level's first half still
    ends where it ended. Raises SettingError where another size differs.
    """
    old, deeper = regressor.config.adapter_blocks, Regressor(config)
    given, wanted = regressor.state_dict(), deeper.state_dict()
    for name, value in given.items():
        head, dot, rest = name.partition("latent_proj.levels.")
        if dot:
            level, index, inner = rest.split(".", 2)
            place = int(index)
            if int(level) == config.adapter_climb and place > old:
                place += config.adapter_blocks - old
            name = f"{head}{dot}{level}.{place}.{inner}"
        if name not in wanted or wanted[name].shape != value.shape:
            raise SettingError(f"{name} does not fit: a regressor grows in adapter_blocks only, and never shrinks.")
        wanted[name] = value
    deeper.load_state_dict(wanted)
    return deeper
