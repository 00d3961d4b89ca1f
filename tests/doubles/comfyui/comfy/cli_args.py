# SPDX-License-Identifier: Apache-2.0
"""The command line: how previews are made."""

from __future__ import annotations

import enum
from types import SimpleNamespace


class LatentPreviewMethod(enum.Enum):
    NoPreviews = "none"
    Latent2RGB = "latent2rgb"


args = SimpleNamespace(preview_method=LatentPreviewMethod.Latent2RGB, cpu=True)
