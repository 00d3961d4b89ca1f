# SPDX-License-Identifier: Apache-2.0
"""What a decoded picture can be held to, by name."""

from __future__ import annotations

from typing import Literal, get_args

Lock = Literal["off", "soft", "full", "detail"]
"""Nothing; wide areas' brightness and hue; the same down to a few pixels; all that the reference shows."""

LOCKS: tuple[Lock, ...] = get_args(Lock)
HOLDING = LOCKS[1:]
"""Those that need a reference."""
