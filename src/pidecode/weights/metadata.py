# SPDX-License-Identifier: Apache-2.0
"""Checkpoint metadata: what a weights file says of itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pidecode.errors import CheckpointError, SettingError
from pidecode.registry.configs import PiDConfig, TinyDecoderConfig
from pidecode.strict_json import parse_json

CheckpointKind = Literal["feed-forward", "student", "teacher", "backbone", "encoder"]
"""A decoder of one evaluation, of few distilled steps, of many guided ones; a text-to-image network; an encoder."""
KINDS: tuple[str, ...] = get_args(CheckpointKind)
METADATA_KEY = "pidecode"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMetadata:
    """Everything a weights file must tell, and its tensors alone cannot."""

    kind: CheckpointKind
    config: PiDConfig | TinyDecoderConfig | None  # None for an encoder, whose own is `extra["config"]`
    space: str | None = None  # latent space it belongs to, if any
    variant: str | None = None  # release it belongs to, if any
    license: str | None = None  # short name of the weights' license, None where unknown
    times: tuple[float, ...] = ()  # step times of a student, from noise to image; empty for the standard ones
    extra: Mapping[str, Any] = field(default_factory=dict)  # whatever else the file says, kept as it is

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        if (self.config is None) != (self.kind == "encoder"):
            raise SettingError(f"A {self.kind} {'needs a' if self.config is None else 'has no'} network configuration.")
        if self.config is not None and isinstance(self.config, TinyDecoderConfig) != (self.kind == "feed-forward"):
            raise SettingError(f"A {self.kind} network cannot have a {type(self.config).__name__}.")

    def to_metadata(self) -> dict[str, str]:
        """Metadata of a .safetensors file, which `from_metadata` reads back."""
        record: dict[str, Any] = {
            **self.extra, "format": FORMAT, "kind": self.kind, "space": self.space, "variant": self.variant,
            "license": self.license, "times": list(self.times),
        }  # fmt: skip
        if self.config is not None:
            record["config"] = self.config.to_dict()
        if isinstance(self.config, PiDConfig):
            record["prediction"] = self.config.prediction
        return {"format": "pt", METADATA_KEY: json.dumps(record)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: str = "the file") -> CheckpointMetadata | None:
        """The record in a file's metadata, if it has one. Raises CheckpointError for a wrong or a later version's."""
        if METADATA_KEY not in metadata:
            return None
        try:
            record = parse_json(metadata[METADATA_KEY])
            if not isinstance(record, dict):
                raise TypeError("it is no table")
            if record.get("format") != FORMAT:
                raise CheckpointError(
                    f"{source} is of format {record.get('format')!r}, this version reads {FORMAT}; update pidecode."
                )
            config: PiDConfig | TinyDecoderConfig | None = None
            if record["kind"] != "encoder":
                described = TinyDecoderConfig if record["kind"] == "feed-forward" else PiDConfig
                config = described.from_dict(record["config"])
            if isinstance(config, PiDConfig) and record.get("prediction", config.prediction) != config.prediction:
                raise ValueError("prediction is said twice, differently")
            known = {"format", "kind", "space", "variant", "license", "times", "prediction"}
            known |= {"config"} if config is not None else set()
            texts = {name: record.get(name) for name in ("space", "variant", "license")}
            for name, value in texts.items():
                if value is not None and not isinstance(value, str):
                    raise TypeError(f"{name} is {value!r}, not text")
            times = tuple(float(value) for value in record.get("times") or ())
            if any(not 0 <= time <= 1 for time in times) or any(a <= b for a, b in itertools.pairwise(times)):
                raise ValueError(f"times {list(times)} do not fall from 1 to 0")
            extra = {name: value for name, value in record.items() if name not in known}
            return cls(kind=record["kind"], config=config, times=times, extra=extra, **texts)
        except (ValueError, KeyError, TypeError) as fault:
            raise CheckpointError(f"{source} describes itself wrongly ({fault}); convert the original again.") from None
