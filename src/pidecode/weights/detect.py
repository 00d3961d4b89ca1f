# SPDX-License-Identifier: Apache-2.0
"""A weights file -> what it is: shapes first, then its metadata, its official name, the caller; never a guess."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pidecode.errors import CheckpointError, SettingError
from pidecode.facts import architecture
from pidecode.facts.architecture import NetConfig
from pidecode.facts.checkpoints import CHECKPOINTS, Checkpoint
from pidecode.facts.spaces import SPACES, LatentSpace, get_space
from pidecode.weights.identity import KINDS, Identity, Kind
from pidecode.weights.read import WeightFile
from pidecode.weights.shapes import Structure, read_structure

BACKBONE_SPACE = "pixeldit"
"""What stands for a latent space in the table's row of the bare backbone."""

_OFFICIAL = re.compile(
    r"PiD_(?P<v1pt5>v1pt5_)?res(?P<range>2k|2kto4k)_sr\dx_official_(?P<space>[a-z0-9]+)_"
    r"(?P<kind>distill_4step|undistilled)(_2606)?"
)
_COMFY = re.compile(
    r"pid_(?P<v1pt5>1\.5_)?(?P<space>flux1|flux2|sd3|sdxl|qwenimage)_(?P<range>512_to_2048|1024_to_4096)"
    r"(?P<kind>_4step)?(_2606)?(_[a-z0-9]+)*"
)
_VARIANTS = {"2k": "2k", "512_to_2048": "2k", "2kto4k": "2kto4k", "1024_to_4096": "2kto4k"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What the caller knows of a file and its tensors cannot show.

    space: latent space, by name or alias. variant: release, as in the table of checkpoints. kind: student,
    teacher or backbone. overrides: values of NetConfig fields, for networks unlike any released one.
    """

    space: str | None = None
    variant: str | None = None
    kind: str | None = None
    overrides: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS[:3]:
            raise SettingError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS[:3])}.")
        unknown = set(self.overrides or {}) - set(NetConfig.__dataclass_fields__)
        if unknown:
            raise SettingError(f"overrides name {', '.join(sorted(unknown))}, which no network has.")

    @property
    def space_name(self) -> str | None:
        """The space under its own name, aliases resolved. Raises SettingError for an unknown one."""
        return self.space if self.space in (None, BACKBONE_SPACE) else get_space(self.space or "").name


def detect(file: WeightFile, hints: Hints | None = None) -> Identity:
    """What network a file holds (SPEC.md sections 1, 2, 6).

    Our own metadata decides where the file has it; otherwise the shapes, then the official file or folder name
    (also ComfyUI's), then `hints`. What two of them say differently is an error, and so is what none of them says.
    Raises SettingError when the caller can settle it, CheckpointError when the file cannot be right.
    """
    hints = hints or Hints()
    own = Identity.from_metadata(file.metadata, str(file.path))
    return _from_metadata(file, own, hints) if own else _from_evidence(file, hints)


def _from_metadata(file: WeightFile, own: Identity, hints: Hints) -> Identity:
    if own.config is None:
        raise CheckpointError(f"{file.path} holds an image encoder, not a decoder; name the decoder's file.")
    told = _told(hints)
    _agree(file.path, "its metadata", {name: getattr(own, name) for name in told}, told)
    config = replace(own.config, **(hints.overrides or {}))
    structure = read_structure(file.shapes, str(file.path), config.inject_interval)
    if said := structure.disagreement(config):
        raise CheckpointError(f"{file.path} contradicts itself: {said}.")
    filled = {name: value for name, value in told.items() if getattr(own, name) is None}
    return replace(own, config=config, **filled)


def _from_evidence(file: WeightFile, hints: Hints) -> Identity:
    overrides = dict(hints.overrides or {})
    structure = read_structure(file.shapes, str(file.path), overrides.get("inject_interval"))
    named, told = official_name(file.path), _told(hints)
    _agree(file.path, "its name", named, told)
    known = {**named, **told}
    if not structure.has_adapter:
        return _backbone(file.path, structure, known, overrides)
    if known.get("space") == BACKBONE_SPACE or known.get("kind") == "backbone":
        raise CheckpointError(f"{file.path} is no bare backbone: it has an adapter for a latent.")
    space = known.get("space") or _only_space(file.path, structure, known, overrides)
    config = _config(file.path, structure, space, overrides)
    variant = known.get("variant")
    if variant is not None and variant.endswith("_v1pt5") != (structure.generation == "v1pt5"):
        raise CheckpointError(f"{file.path} is no {variant!r}: by its tensors it is built like {structure.generation}.")
    rows = [row for row in _rows_like(structure) if row.space == space]
    kind = known.get("kind") or _only_kind(file.path, structure, rows, variant)
    rows = [row for row in rows if row.kind == kind]
    variant = variant or (rows[0].variant if len(rows) == 1 else None)
    return Identity(
        kind=kind, config=config, space=space, variant=variant, license=rows[0].license.name if rows else None
    )


def _told(hints: Hints) -> dict[str, Any]:
    told = {"space": hints.space_name, "variant": hints.variant, "kind": hints.kind}
    return {name: value for name, value in told.items() if value is not None}


def _agree(path: Path, what: str, said: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    for name, value in told.items():
        if said.get(name) not in (None, value):
            raise SettingError(
                f"{path} is of {name} {said[name]!r} by {what}, and {name}={value!r} was asked for. "
                f"Leave {name} out to use the file as what it is."
            )


def official_name(path: str | Path) -> dict[str, str]:
    """Space, variant and kind from an official folder or file name, or ComfyUI's; empty for any other name."""
    path = Path(path)
    for name in (path.stem, *path.parts[-2:-4:-1]):
        if name == "PixelDiT_finetune_2kto4k":
            return {"space": BACKBONE_SPACE, "variant": "2kto4k", "kind": "backbone"}
        found = _OFFICIAL.fullmatch(name) or _COMFY.fullmatch(name)
        if not found:
            continue
        space = "flux" if found["space"] == "flux1" else found["space"]
        if space not in SPACES:
            continue
        variant = _VARIANTS[found["range"]] + ("_v1pt5" if found["v1pt5"] else "")
        student = found["kind"] in ("distill_4step", "_4step")
        return {"space": space, "variant": variant, "kind": "student" if student else "teacher"}
    return {}


def _backbone(path: Path, structure: Structure, known: Mapping[str, str], overrides: dict[str, Any]) -> Identity:
    space, kind = known.get("space", BACKBONE_SPACE), known.get("kind", "backbone")
    if space != BACKBONE_SPACE or kind != "backbone":
        raise CheckpointError(
            f"{path} has no adapter (no tensors below lq_proj.): it is a bare text-to-image backbone and cannot "
            f"decode latents{'' if space == BACKBONE_SPACE else f' of {space}'}. Take the decoder's own file."
        )
    if not known and "rope_reference" not in overrides:
        raise SettingError(
            f"{path} is a bare backbone whose tensors cannot show the size it was trained at. Say "
            f"space={BACKBONE_SPACE!r} for NVIDIA's 2K to 4K fine-tune, or overrides={{'rope_reference': ...}}."
        )
    config = _checked(path, structure, {**_values(architecture.backbone()), **structure.seen, **overrides})
    return Identity(kind="backbone", config=config, variant=known.get("variant"), license="NSCLv1" if known else None)


def _rows_like(structure: Structure) -> list[Checkpoint]:
    """Released checkpoints whose tensors would have exactly these shapes."""
    return [row for row in CHECKPOINTS.values() if row.config and not structure.disagreement(row.config)]


def _only_space(path: Path, structure: Structure, known: Mapping[str, str], overrides: dict[str, Any]) -> str | None:
    """The one latent space the shapes leave; None where the overrides describe a space of the caller's own."""
    if {"latent_channels", "latent_down"} <= set(overrides):
        return None
    rows = [row for row in _rows_like(structure) if known.get("variant") in (None, row.variant)]
    spaces = sorted({row.space for row in rows}) or [
        space.name for space in SPACES.values() if _base(structure, space) is not None
    ]
    if len(spaces) == 1:
        return spaces[0]
    if spaces:
        raise SettingError(
            f"{path} may be for {' or '.join(spaces)}: its tensors look alike for all of them, and a wrong choice "
            f"gives wrong colors. Say which: space={spaces[0]!r} (--space {spaces[0]})."
        )
    raise SettingError(
        f"{path} takes latents of {structure.latent_in} channels, as no known latent space has. Give overrides= with "
        "latent_channels, latent_down, latent_unpatchify and scale, or a file that carries them in its metadata."
    )


def _only_kind(path: Path, structure: Structure, rows: list[Checkpoint], variant: str | None) -> Kind:
    """The one kind the table leaves; the color head, which only teachers surely keep, speaks against "student"."""
    kinds = {row.kind for row in rows if variant in (None, row.variant)}
    if len(kinds) == 1:
        return kinds.pop()
    if variant is not None and "student" in kinds and not structure.color_out:
        return "student"  # a variant without a kind names the distilled network, here as everywhere
    raise SettingError(
        f"{path} may be a student (4 steps) or a teacher (many guided steps): its tensors cannot show which. "
        "Say kind='student' or kind='teacher' (--kind)."
    )


def _values(config: NetConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in NetConfig.__dataclass_fields__}


def _base(structure: Structure, space: LatentSpace) -> dict[str, Any] | None:
    """What a released network for that space has and its tensors do not show; None if the channels do not fit."""
    generation = structure.generation or "v1pt5"
    for fold in sorted({1, space.raw_patch}):
        if generation == "v1":
            config = architecture.v1(latent_channels=space.channels, latent_down=space.down, scale=space.scale)
        else:
            config = architecture.v1pt5(latent_channels=space.channels, latent_down=space.down)
        values = {**_values(config), "scale": space.scale, "latent_unpatchify": fold} | dict(structure.seen)
        _count_picture_channels(structure, values)
        try:
            if structure.disagreement(NetConfig(**values)) is None:
                return values
        except SettingError:  # sizes that cannot go together: not this space
            continue
    return None


def _config(path: Path, structure: Structure, space: str | None, overrides: dict[str, Any]) -> NetConfig:
    if structure.generation is None and not {"adapter_padding", "rope_reference"} <= set(overrides):
        raise SettingError(
            f"{path} is built neither like v1 nor like v1.5 (gate {structure.seen['gate']}, injection into "
            f"pixel blocks {structure.seen['inject_pixels']}), so its padding and rotation reference are unknown. "
            "Give overrides= with adapter_padding and rope_reference."
        )
    base = _base(structure, SPACES[space]) if space else None
    if base is None and not {"latent_channels", "latent_down"} <= set(overrides):
        row = SPACES[space or "flux"]
        raise CheckpointError(
            f"{path} is no network for {row.name}: its adapter takes {structure.latent_in} channels, and latents of "
            f"{row.name} have {row.channels}. Name the space the file is for."
        )
    if base is None:
        default = architecture.v1 if structure.generation == "v1" else architecture.v1pt5
        shown = _values(default(latent_channels=overrides["latent_channels"], latent_down=overrides["latent_down"]))
        base = {**shown, **structure.seen}
    return _checked(path, structure, {**base, **overrides})


def _checked(path: Path, structure: Structure, values: dict[str, Any]) -> NetConfig:
    _count_picture_channels(structure, values)
    config = NetConfig(**values)
    if said := structure.disagreement(config):
        raise SettingError(f"{path} does not go with these settings: {said}.")
    return config


def _count_picture_channels(structure: Structure, values: dict[str, Any]) -> None:
    """A picture branch takes the pixels of a patch as channels; how many those are depends on the scale."""
    if structure.image_in and not values["adapter_image_channels"]:
        values["adapter_image_channels"] = structure.image_in // max(1, values["patch_size"] // values["scale"]) ** 2
