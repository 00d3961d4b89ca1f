# SPDX-License-Identifier: Apache-2.0
"""What a weights file holds, from shapes, metadata, official name and overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pidecode.errors import CheckpointError, SettingError
from pidecode.registry import configs
from pidecode.registry.checkpoints import CHECKPOINTS, Checkpoint
from pidecode.registry.configs import PiDConfig, TinyDecoderConfig
from pidecode.registry.spaces import SPACES, LatentSpace, get_space
from pidecode.weights.metadata import KINDS, CheckpointKind, CheckpointMetadata
from pidecode.weights.read import WeightFile

Shapes = Mapping[str, tuple[int, ...]]
Generation = Literal["v1", "v1pt5", "backbone"]

COLOR_HEAD = "lq_proj.lq_aux_rgb_head."
"""Names of the one part that only training uses; files may have it or not."""

ADAPTER = ("lq_proj.", "pit_lq_gate.")
"""Names of the parts that take the latent in."""

_COMMON_INTERVAL = 2
"""Every released network injects before every second block; taken where the shapes allow several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferredShape:
    """What tensors show of their network.

    seen: values of PiDConfig fields read from names and shapes.
    latent_in: channels the adapter's first convolution takes, after unpatchifying or folding; 0 without one.
    image_in: the same of the adapter's image branch.
    color_out: outputs of the color head, `3 (patch_size / scale)^2`; 0 without one.
    """

    seen: Mapping[str, Any]
    latent_in: int = 0
    image_in: int = 0
    color_out: int = 0

    @property
    def has_adapter(self) -> bool:
        """Whether a latent or an image enters the network."""
        return self.latent_in > 0 or self.image_in > 0

    @property
    def generation(self) -> Generation | None:
        """The released design this is built like, or None for a mixture of v1 and v1.5."""
        if not self.has_adapter:
            return "backbone"
        kinds: dict[tuple[str, bool], Generation] = {("per_channel", False): "v1", ("per_token", True): "v1pt5"}
        return kinds.get((self.seen["gate"], self.seen["inject_pixels"]))

    def disagreement(self, config: PiDConfig) -> str | None:
        """The first thing a configuration says otherwise than the tensors, in words; None if there is none.

        The color head may be in a configuration and not in the file, or the other way round.
        """
        for name, value in self.seen.items():
            if name != "color_head" and getattr(config, name) != value:
                return f"{name} is {value} by its tensors and {getattr(config, name)} by the configuration"
        expected = (_latent_in(config), _image_in(config))
        if expected != (self.latent_in, self.image_in):
            return (
                f"its adapter takes {self.latent_in or self.image_in} channels, and latent_channels="
                f"{config.latent_channels}, latent_down={config.latent_down}, latent_unpatchify="
                f"{config.latent_unpatchify}, scale={config.scale} would make it {expected[0] or expected[1]}"
            )
        if self.color_out and self.color_out != 3 * (config.patch_size // config.scale) ** 2:
            return f"its color head has {self.color_out} outputs, which is not 3 (patch_size / {config.scale})^2"
        return None


def _latent_in(config: PiDConfig) -> int:
    ratio = config.latent_to_patch_ratio
    fold = round(1 / ratio) if 0 < ratio < 1 else 1
    return config.latent_channels // config.latent_unpatchify**2 * fold**2


def _image_in(config: PiDConfig) -> int:
    return config.adapter_image_channels * (config.patch_size // config.scale) ** 2


def infer_shape(shapes: Shapes, source: str = "the file", interval: int | None = None) -> InferredShape:
    """Everything names and shapes show (docs/architecture.md, Network and Adapter), for a network of any size.

    interval: `inject_interval`, where it is known from elsewhere.
    Raises CheckpointError when the tensors are of no PiD network, or contradict each other.
    """
    look = _Look(shapes, source)
    seen: dict[str, Any] = {**_patch_path(look), **_pixel_path(look)}
    if "y_pos_embedding" in shapes:
        seen["text_dim"] = look("y_embedder.proj.weight")[1]
        seen["text_length"] = look("y_pos_embedding")[1]
    else:
        seen["text_dim"] = 0
    if not any(name.startswith(ADAPTER) for name in shapes):
        return InferredShape(seen=seen | {"latent_channels": 0, "adapter_image_channels": 0})
    return _adapter(look, seen, interval)


@dataclass(frozen=True, slots=True)
class _Look:
    """Shapes by name; a missing one is an error that says what the file lacks."""

    shapes: Shapes
    source: str

    def __call__(self, name: str, rank: int = 2) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            some = ", ".join(list(self.shapes)[:3])
            raise CheckpointError(
                f"{self.source} holds no PiD network: it lacks {name} (it holds {some}, ...). "
                "Check that it is a decoder, not an autoencoder, text encoder or LoRA."
            )
        if len(shape) < min(rank, 3) and name != "y_pos_embedding":
            raise CheckpointError(f"{self.source}: {name} has shape {list(shape)}; {rank} sides were expected.")
        return shape

    def count(self, pattern: str) -> int:
        """How many numbered parts `pattern` (with one group) finds; they must run from its first without a gap."""
        numbers = sorted({int(found[1]) for name in self.shapes if (found := re.match(pattern, name))})
        if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise CheckpointError(f"{self.source} lacks parts in the middle of {pattern.split(chr(92))[0]}: {numbers}.")
        return len(numbers)

    def root(self, area: int, what: str) -> int:
        side = math.isqrt(area) if area > 0 else 0
        if side == 0 or side * side != area:
            raise CheckpointError(f"{self.source}: {what} is {area}, which is no square; this is no PiD network.")
        return side

    def heads(self, width: int, head_dim: int, what: str) -> int:
        if head_dim == 0 or width % head_dim:
            raise CheckpointError(f"{self.source}: {what} {width} does not divide into heads of {head_dim}.")
        return width // head_dim


def _patch_path(look: _Look) -> dict[str, Any]:
    hidden, patch_inputs = look("s_embedder.proj.weight")[:2]
    head_dim = look("patch_blocks.0.attn.q_norm_x.weight", 1)[0]
    return {
        "hidden_size": hidden,
        "num_heads": look.heads(hidden, head_dim, "hidden size"),
        "patch_depth": look.count(r"patch_blocks\.(\d+)\."),
        "patch_size": look.root(patch_inputs // 3, "the number of pixels in a patch"),
    }


def _pixel_path(look: _Look) -> dict[str, Any]:
    width = look("pixel_embedder.proj.weight")[0]
    seen: dict[str, Any] = {"pixel_hidden_size": width, "pixel_depth": look.count(r"pixel_blocks\.(\d+)\.")}
    if seen["pixel_depth"]:
        attention, flat = look("pixel_blocks.0.compress_to_attn.weight")[:2]
        head_dim = look("pixel_blocks.0.attn.q_norm.weight", 1)[0]
        seen["pixel_attn_hidden_size"] = attention
        seen["pixel_num_heads"] = look.heads(attention, head_dim, "pixel attention width")
        pixels = look("s_embedder.proj.weight")[1] // 3
        modulated = look("pixel_blocks.0.adaLN_modulation.0.weight")[0]
        if flat != pixels * width or modulated != 6 * flat:
            raise CheckpointError(
                f"{look.source} contradicts itself: patches of {pixels} pixels, {width} channels a pixel, "
                f"but pixel blocks for {flat} values and {modulated} modulations."
            )
    return seen


def _adapter(look: _Look, seen: dict[str, Any], interval: int | None) -> InferredShape:
    shapes = look.shapes
    starts = {tower: f"lq_proj.{tower}.0.weight" for tower in ("latent_proj", "image_conv")}
    towers = [tower for tower, start in starts.items() if start in shapes]
    if not towers:
        look("lq_proj.latent_proj.0.weight")
    heads = look.count(r"lq_proj\.output_heads\.(\d+)\.")
    color = COLOR_HEAD + "3.weight" in shapes
    gate_rows = look("lq_proj.gate_modules.0.content_proj.weight")[0]
    seen["adapter_blocks"] = look.count(rf"lq_proj\.{towers[0]}\.(\d+)\.block\.")
    seen |= {
        "adapter_width": look("lq_proj.output_heads.0.weight")[1],
        "gate": "per_token" if gate_rows == 1 else "per_channel",
        "inject_pixels": "pit_lq_gate.log_alpha" in shapes,
        "inject_interval": _interval(look.source, seen["patch_depth"], heads, interval),
        "color_head": color,
    }
    inputs = {tower: look(starts[tower], 4)[1] for tower in towers}
    return InferredShape(
        seen=seen,
        latent_in=inputs.get("latent_proj", 0),
        image_in=inputs.get("image_conv", 0),
        color_out=look(COLOR_HEAD + "3.weight")[0] if color else 0,
    )


def _interval(source: str, depth: int, heads: int, known: int | None) -> int:
    """Blocks from one injection to the next, from their number: `ceil(depth / interval) == heads`."""
    fitting = [step for step in range(1, depth + 1) if math.ceil(depth / step) == heads]
    if known is not None and heads == math.ceil(depth / known):
        return known
    if not fitting or known is not None:
        raise CheckpointError(
            f"{source} has {heads} injection heads for {depth} patch blocks; no interval gives that"
            f"{f', nor does inject_interval={known}' if known else ''}. Parts of the adapter are missing."
        )
    if len(fitting) == 1 or _COMMON_INTERVAL in fitting:
        return fitting[0] if len(fitting) == 1 else _COMMON_INTERVAL
    if heads == 1:
        return depth
    raise SettingError(
        f"{source} has {heads} injection heads for {depth} patch blocks, which fits an interval of "
        f"{' or '.join(map(str, fitting))}; say which by overrides={{'inject_interval': ...}}."
    )


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
class Overrides:
    """What the caller knows of a file and its tensors cannot show.

    space: latent space, by name or alias. variant: release, as in the table of checkpoints. kind: feed-forward,
    student, teacher or backbone. overrides: values of PiDConfig fields, for networks unlike any released one.
    """

    space: str | None = None
    variant: str | None = None
    kind: str | None = None
    overrides: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS[:4]:
            raise SettingError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS[:4])}.")
        unknown = set(self.overrides or {}) - set(PiDConfig.__dataclass_fields__)
        if unknown:
            raise SettingError(f"overrides name {', '.join(sorted(unknown))}, which no network has.")

    @property
    def space_name(self) -> str | None:
        """The space under its own name, aliases resolved. Raises SettingError for an unknown one."""
        return self.space if self.space in (None, BACKBONE_SPACE) else get_space(self.space or "").name


def detect(file: WeightFile, hints: Overrides | None = None) -> CheckpointMetadata:
    """What network a file holds (docs/architecture.md, Network, Adapter, Released files).

    Our own metadata decides where the file has it; otherwise the shapes, then the official file or folder name
    (also ComfyUI's), then `hints`. What two of them say differently is an error, and so is what none of them says.
    Raises SettingError when the caller can settle it, CheckpointError when the file cannot be right.
    """
    hints = hints or Overrides()
    own = CheckpointMetadata.from_metadata(file.metadata, str(file.path))
    return _from_metadata(file, own, hints) if own else _from_evidence(file, hints)


def _from_metadata(file: WeightFile, own: CheckpointMetadata, hints: Overrides) -> CheckpointMetadata:
    if own.config is None:
        raise CheckpointError(f"{file.path} holds an image encoder, not a decoder; name the decoder's file.")
    told = _told(hints)
    _agree(file.path, "its metadata", {name: getattr(own, name) for name in told}, told)
    if isinstance(own.config, TinyDecoderConfig):
        if hints.overrides:
            raise SettingError(f"{file.path} is a feed-forward decoder, whose file settles its shape; leave them out.")
        return own
    config = replace(own.config, **(hints.overrides or {}))
    structure = infer_shape(file.shapes, str(file.path), config.inject_interval)
    if said := structure.disagreement(config):
        raise CheckpointError(f"{file.path} contradicts itself: {said}.")
    filled = {name: value for name, value in told.items() if getattr(own, name) is None}
    return replace(own, config=config, **filled)


def _from_evidence(file: WeightFile, hints: Overrides) -> CheckpointMetadata:
    overrides = dict(hints.overrides or {})
    structure = infer_shape(file.shapes, str(file.path), overrides.get("inject_interval"))
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
    return CheckpointMetadata(
        kind=kind, config=config, space=space, variant=variant, license=rows[0].license.name if rows else None
    )


def _told(hints: Overrides) -> dict[str, Any]:
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


def _backbone(
    path: Path, structure: InferredShape, known: Mapping[str, str], overrides: dict[str, Any]
) -> CheckpointMetadata:
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
    config = _checked(path, structure, {**_values(configs.backbone()), **structure.seen, **overrides})
    return CheckpointMetadata(
        kind="backbone", config=config, variant=known.get("variant"), license="NSCLv1" if known else None
    )


def _rows_like(structure: InferredShape) -> list[Checkpoint]:
    """Released checkpoints whose tensors would have exactly these shapes."""
    return [row for row in CHECKPOINTS.values() if row.config and not structure.disagreement(row.config)]


def _only_space(
    path: Path, structure: InferredShape, known: Mapping[str, str], overrides: dict[str, Any]
) -> str | None:
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


def _only_kind(path: Path, structure: InferredShape, rows: list[Checkpoint], variant: str | None) -> CheckpointKind:
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


def _values(config: PiDConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in PiDConfig.__dataclass_fields__}


def _base(structure: InferredShape, space: LatentSpace) -> dict[str, Any] | None:
    """What a released network for that space has and its tensors do not show; None if the channels do not fit."""
    generation = structure.generation or "v1pt5"
    for fold in sorted({1, space.raw_patch}):
        if generation == "v1":
            config = configs.v1(latent_channels=space.channels, latent_down=space.down, scale=space.scale)
        else:
            config = configs.v1pt5(latent_channels=space.channels, latent_down=space.down)
        values = {**_values(config), "scale": space.scale, "latent_unpatchify": fold} | dict(structure.seen)
        _count_image_channels(structure, values)
        try:
            if structure.disagreement(PiDConfig(**values)) is None:
                return values
        except SettingError:  # sizes that cannot go together: not this space
            continue
    return None


def _config(path: Path, structure: InferredShape, space: str | None, overrides: dict[str, Any]) -> PiDConfig:
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
        default = configs.v1 if structure.generation == "v1" else configs.v1pt5
        shown = _values(default(latent_channels=overrides["latent_channels"], latent_down=overrides["latent_down"]))
        base = {**shown, **structure.seen}
    return _checked(path, structure, {**base, **overrides})


def _checked(path: Path, structure: InferredShape, values: dict[str, Any]) -> PiDConfig:
    _count_image_channels(structure, values)
    config = PiDConfig(**values)
    if said := structure.disagreement(config):
        raise SettingError(f"{path} does not go with these settings: {said}.")
    return config


def _count_image_channels(structure: InferredShape, values: dict[str, Any]) -> None:
    """An image branch takes the pixels of a patch as channels; how many those are depends on the scale."""
    if structure.image_in and not values["adapter_image_channels"]:
        values["adapter_image_channels"] = structure.image_in // max(1, values["patch_size"] // values["scale"]) ** 2
