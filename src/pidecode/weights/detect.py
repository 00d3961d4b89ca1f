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

COLOR_HEAD = "lq_proj.lq_aux_rgb_head."  # prefix of the color head, which only training uses; files may lack it
ADAPTER = ("lq_proj.", "pit_lq_gate.")  # prefixes of the adapter and its gates
_COMMON_INTERVAL = 2  # `inject_interval` of every released network; taken where the shapes allow several


@dataclass(frozen=True, slots=True, kw_only=True)
class InferredShape:
    """What the names and shapes of tensors show of their network."""

    values: Mapping[str, Any]  # fields of PiDConfig that can be inferred
    # Input channels of the adapter's first convolution, after unpatchify or pixel-unshuffle; 0 if none.
    latent_in: int = 0
    image_in: int = 0  # the same of the adapter's image branch
    color_out: int = 0  # outputs of the color head, `3 (patch_size / scale)^2`; 0 if none

    @property
    def has_adapter(self) -> bool:
        """Whether a latent or an image enters the network."""
        return self.latent_in > 0 or self.image_in > 0

    @property
    def generation(self) -> Generation | None:
        """The released generation with this gate and injection; None for a mixture of v1 and v1.5."""
        if not self.has_adapter:
            return "backbone"
        kinds: dict[tuple[str, bool], Generation] = {("per_channel", False): "v1", ("per_token", True): "v1pt5"}
        return kinds.get((self.values["gate"], self.values["inject_pixels"]))

    def difference_from(self, config: PiDConfig) -> str | None:
        """The first difference between a configuration and the tensors, or None; either may lack the color head."""
        for name, value in self.values.items():
            if name != "color_head" and getattr(config, name) != value:
                return f"{name} is {value} by its tensors and {getattr(config, name)} by the configuration"
        ratio = config.latent_to_patch_ratio
        fold = round(1 / ratio) if 0 < ratio < 1 else 1
        latent_in = config.latent_channels // config.latent_unpatchify**2 * fold**2
        expected = latent_in, config.adapter_image_channels * (config.patch_size // config.scale) ** 2
        if expected != (self.latent_in, self.image_in):
            return (
                f"its adapter takes {self.latent_in or self.image_in} channels, and latent_channels="
                f"{config.latent_channels}, latent_down={config.latent_down}, latent_unpatchify="
                f"{config.latent_unpatchify}, scale={config.scale} would make it {expected[0] or expected[1]}"
            )
        if self.color_out and self.color_out != 3 * (config.patch_size // config.scale) ** 2:
            return f"its color head has {self.color_out} outputs, which is not 3 (patch_size / {config.scale})^2"
        return None


def infer_shape(shapes: Shapes, source: str = "the file", interval: int | None = None) -> InferredShape:
    """A network's configuration by names and shapes (docs/architecture.md, Network and Adapter), of any size.

    Args:
        shapes: Shape of every tensor.
        source: What error messages call the file.
        interval: `inject_interval`, if it is known.

    Raises:
        CheckpointError: The tensors are not those of a PiD network, or contradict each other.
    """
    reader = _ShapeReader(shapes, source)
    values = {**_patch_path(reader), **_pixel_path(reader), "text_dim": 0}
    if "y_pos_embedding" in shapes:
        values["text_dim"] = reader("y_embedder.proj.weight")[1]
        values["text_length"] = reader("y_pos_embedding", 3)[1]
    if not any(name.startswith(ADAPTER) for name in shapes):
        return InferredShape(values=values | {"latent_channels": 0, "adapter_image_channels": 0})
    return _adapter(reader, values, interval)


@dataclass(frozen=True, slots=True)
class _ShapeReader:
    """Shapes by name; a missing one raises CheckpointError."""

    shapes: Shapes
    source: str

    def __call__(self, name: str, rank: int = 2) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            some = ", ".join(list(self.shapes)[:3])
            raise CheckpointError(
                f"{self.source} does not hold a PiD network: it lacks {name} (it holds {some}, ...). "
                "Check that it is a decoder, not an autoencoder, text encoder or LoRA."
            )
        if len(shape) < rank:
            raise CheckpointError(f"{self.source}: {name} has shape {list(shape)}; {rank} dimensions were expected.")
        return shape

    def count(self, pattern: str) -> int:
        """Number of numbered modules that `pattern` (with one group) matches; they must be consecutive."""
        numbers = sorted({int(found[1]) for name in self.shapes if (found := re.match(pattern, name))})
        if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise CheckpointError(f"{self.source} lacks some of {pattern.split(chr(92))[0]}: {numbers}.")
        return len(numbers)

    def heads(self, width: int, head_dim: int, what: str) -> int:
        if head_dim == 0 or width % head_dim:
            raise CheckpointError(f"{self.source}: {what} {width} does not divide into heads of {head_dim}.")
        return width // head_dim


def _patch_path(reader: _ShapeReader) -> dict[str, Any]:
    hidden, patch_inputs = reader("s_embedder.proj.weight")[:2]
    head_dim = reader("patch_blocks.0.attn.q_norm_x.weight", 1)[0]
    pixels, patch_size = patch_inputs // 3, math.isqrt(patch_inputs // 3)
    if not pixels or patch_size**2 != pixels:
        raise CheckpointError(f"{reader.source}: a patch has {pixels} pixels, no square; this is no PiD network.")
    heads, depth = reader.heads(hidden, head_dim, "hidden size"), reader.count(r"patch_blocks\.(\d+)\.")
    return {"hidden_size": hidden, "num_heads": heads, "patch_depth": depth, "patch_size": patch_size}


def _pixel_path(reader: _ShapeReader) -> dict[str, Any]:
    width = reader("pixel_embedder.proj.weight")[0]
    values: dict[str, Any] = {"pixel_hidden_size": width, "pixel_depth": reader.count(r"pixel_blocks\.(\d+)\.")}
    if values["pixel_depth"]:
        attention, flat = reader("pixel_blocks.0.compress_to_attn.weight")[:2]
        head_dim = reader("pixel_blocks.0.attn.q_norm.weight", 1)[0]
        values["pixel_attn_hidden_size"] = attention
        values["pixel_num_heads"] = reader.heads(attention, head_dim, "pixel attention width")
        pixels = reader("s_embedder.proj.weight")[1] // 3
        modulated = reader("pixel_blocks.0.adaLN_modulation.0.weight")[0]
        if flat != pixels * width or modulated != 6 * flat:
            raise CheckpointError(
                f"{reader.source} contradicts itself: patches of {pixels} pixels, {width} channels a pixel, "
                f"but pixel blocks for {flat} values and {modulated} modulations."
            )
    return values


def _adapter(reader: _ShapeReader, values: dict[str, Any], interval: int | None) -> InferredShape:
    shapes = reader.shapes
    branches = [name for name in ("latent_proj", "image_conv") if f"lq_proj.{name}.0.weight" in shapes]
    inputs = {name: reader(f"lq_proj.{name}.0.weight", 4)[1] for name in branches or ["latent_proj"]}
    heads = reader.count(r"lq_proj\.output_heads\.(\d+)\.")
    color = COLOR_HEAD + "3.weight" in shapes
    gate_rows = reader("lq_proj.gate_modules.0.content_proj.weight")[0]
    values = values | {
        "adapter_blocks": reader.count(rf"lq_proj\.{branches[0]}\.(\d+)\.block\."),
        "adapter_width": reader("lq_proj.output_heads.0.weight")[1],
        "gate": "per_token" if gate_rows == 1 else "per_channel",
        "inject_pixels": "pit_lq_gate.log_alpha" in shapes,
        "inject_interval": _interval(reader.source, values["patch_depth"], heads, interval),
        "color_head": color,
    }
    return InferredShape(
        values=values, latent_in=inputs.get("latent_proj", 0), image_in=inputs.get("image_conv", 0),
        color_out=reader(COLOR_HEAD + "3.weight")[0] if color else 0,
    )  # fmt: skip


def _interval(source: str, depth: int, heads: int, known: int | None) -> int:
    """Blocks from one injection to the next, from their number: `ceil(depth / interval) == heads`."""
    tried = range(1, depth + 1) if known is None else (known,)
    fitting = [step for step in tried if math.ceil(depth / step) == heads]
    if not fitting:
        raise CheckpointError(
            f"{source} has {heads} injection heads for {depth} patch blocks; no interval gives that"
            f"{f', nor does inject_interval={known}' if known else ''}. Parts of the adapter are missing."
        )
    if _COMMON_INTERVAL in fitting:
        return _COMMON_INTERVAL
    if len(fitting) == 1:
        return fitting[0]
    raise SettingError(
        f"{source} has {heads} injection heads for {depth} patch blocks, which fits an interval of "
        f"{' or '.join(map(str, fitting))}; a file of such a network must have its configuration in its metadata."
    )


BACKBONE_SPACE = "pixeldit"  # the space of the backbone's row in the registry

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
    """What the caller knows of a file and its tensors cannot show."""

    space: str | None = None  # latent space, by name or alias
    variant: str | None = None  # release, as in the table of checkpoints
    kind: str | None = None  # feed-forward, student, teacher or backbone

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS[:4]:
            raise SettingError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS[:4])}.")

    def given(self) -> dict[str, Any]:
        """Space (under its own name), variant and kind, where given. Raises SettingError for an unknown space."""
        space = get_space(self.space).name if self.space not in (None, BACKBONE_SPACE) else self.space
        values = {"space": space, "variant": self.variant, "kind": self.kind}
        return {name: value for name, value in values.items() if value is not None}


def detect(file: WeightFile, overrides: Overrides | None = None) -> CheckpointMetadata:
    """Identify the network in a weights file (docs/architecture.md, Network, Adapter, Released files).

    pidecode's metadata decides if the file has it; otherwise the shapes, then the official file or folder name (also
    ComfyUI's), then `overrides`. A contradiction between two of them is an error.

    Raises:
        SettingError: Something is ambiguous that `overrides` can settle.
        CheckpointError: The file cannot be a network.
    """
    given = {} if overrides is None else overrides.given()
    metadata = CheckpointMetadata.from_metadata(file.metadata, str(file.path))
    if metadata is None:
        return _from_shapes(file, given)
    if metadata.config is None:
        raise CheckpointError(f"{file.path} holds an image encoder, not a decoder; name the decoder's file.")
    _check_agreement(file.path, "its metadata", {name: getattr(metadata, name) for name in given}, given)
    if isinstance(metadata.config, TinyDecoderConfig):
        return metadata
    inferred = infer_shape(file.shapes, str(file.path), metadata.config.inject_interval)
    if difference := inferred.difference_from(metadata.config):
        raise CheckpointError(f"{file.path} contradicts itself: {difference}.")
    return replace(metadata, **{name: value for name, value in given.items() if getattr(metadata, name) is None})


def _from_shapes(file: WeightFile, given: Mapping[str, Any]) -> CheckpointMetadata:
    inferred, named = infer_shape(file.shapes, str(file.path)), official_name(file.path)
    _check_agreement(file.path, "its name", named, given)
    known = {**named, **given}
    if not inferred.has_adapter:
        return _backbone(file.path, inferred, known)
    if known.get("space") == BACKBONE_SPACE or known.get("kind") == "backbone":
        raise CheckpointError(f"{file.path} is no backbone: it has an adapter for a latent.")
    variant = known.get("variant")
    space = known.get("space") or _infer_space(file.path, inferred, variant)
    config = _build_config(file.path, inferred, SPACES[space])
    if variant is not None and variant.endswith("_v1pt5") != (inferred.generation == "v1pt5"):
        raise CheckpointError(f"{file.path} is no {variant!r}: by its tensors it is built like {inferred.generation}.")
    rows = [row for row in _matching_rows(inferred) if row.space == space]
    kind = known.get("kind") or _infer_kind(file.path, inferred, rows, variant)
    rows = [row for row in rows if row.kind == kind]
    variant = variant or (rows[0].variant if len(rows) == 1 else None)
    return CheckpointMetadata(
        kind=kind, config=config, space=space, variant=variant, license=rows[0].license.name if rows else None
    )


def _check_agreement(path: Path, what: str, said: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if said.get(name) not in (None, value):
            raise SettingError(
                f"{path} has {name} {said[name]!r} by {what}, and {name}={value!r} was given. Leave {name} out."
            )


def official_name(path: str | Path) -> dict[str, str]:
    """Space, variant and kind from an official folder or file name, or ComfyUI's; empty for other names."""
    path = Path(path)
    for name in (path.stem, *path.parts[-2:-4:-1]):
        if name == "PixelDiT_finetune_2kto4k":
            return {"space": BACKBONE_SPACE, "variant": "2kto4k", "kind": "backbone"}
        found = _OFFICIAL.fullmatch(name) or _COMFY.fullmatch(name)
        space = "" if found is None else "flux" if found["space"] == "flux1" else found["space"]
        if found and space in SPACES:
            variant = _VARIANTS[found["range"]] + ("_v1pt5" if found["v1pt5"] else "")
            student = found["kind"] in ("distill_4step", "_4step")
            return {"space": space, "variant": variant, "kind": "student" if student else "teacher"}
    return {}


def _backbone(path: Path, inferred: InferredShape, known: Mapping[str, str]) -> CheckpointMetadata:
    space, kind = known.get("space", BACKBONE_SPACE), known.get("kind", "backbone")
    if space != BACKBONE_SPACE or kind != "backbone":
        raise CheckpointError(
            f"{path} has no adapter (no tensors below lq_proj.): it is a bare text-to-image backbone and cannot "
            f"decode latents{'' if space == BACKBONE_SPACE else f' of {space}'}. Take the decoder's own file."
        )
    if not known:
        raise SettingError(
            f"{path} is a backbone whose tensors cannot show the size it was trained at. Give "
            f"space={BACKBONE_SPACE!r} for NVIDIA's 2K to 4K fine-tune."
        )
    config = replace(configs.backbone(), **inferred.values)
    return CheckpointMetadata(kind="backbone", config=config, variant=known.get("variant"), license="NSCLv1")


def _matching_rows(inferred: InferredShape) -> list[Checkpoint]:
    """Released checkpoints whose tensors would have exactly these shapes."""
    return [row for row in CHECKPOINTS.values() if row.config and not inferred.difference_from(row.config)]


def _infer_space(path: Path, inferred: InferredShape, variant: str | None) -> str:
    """The one latent space the shapes leave."""
    spaces = sorted({row.space for row in _matching_rows(inferred) if variant in (None, row.variant)})
    spaces = spaces or [space.name for space in SPACES.values() if _released_config(inferred, space)]
    if len(spaces) == 1:
        return spaces[0]
    if spaces:
        raise SettingError(
            f"{path} may be for {' or '.join(spaces)}: its tensors are alike for all of them, and a wrong choice "
            f"gives wrong colors. Choose one: space={spaces[0]!r}."
        )
    raise SettingError(
        f"{path} takes latents of {inferred.latent_in} channels, as no known latent space has; a file of such a "
        "network must have its configuration in its metadata."
    )


def _infer_kind(path: Path, inferred: InferredShape, rows: list[Checkpoint], variant: str | None) -> CheckpointKind:
    """The only kind the registry leaves. A color head, which only teachers always keep, excludes "student"."""
    kinds = {row.kind for row in rows if variant in (None, row.variant)}
    if len(kinds) == 1:
        return kinds.pop()
    if variant is not None and "student" in kinds and not inferred.color_out:
        return "student"  # a variant without a kind is the distilled network
    raise SettingError(
        f"{path} may be a student (4 steps) or a teacher (many guided steps): its tensors cannot show which.",
        python="Say kind='student' or kind='teacher'.",
        cli=f"Write a file that says it: `pidecode convert {path} said.safetensors --kind student`, or teacher.",
    )


def _released_config(inferred: InferredShape, space: LatentSpace) -> PiDConfig | None:
    """Configuration of a released network of these shapes for that space; None if the channels do not fit."""
    released = configs.v1 if inferred.generation == "v1" else configs.v1pt5
    base = released(latent_channels=space.channels, latent_down=space.down)
    values = {**inferred.values, "scale": space.scale}
    if inferred.image_in:  # the image branch takes a patch's pixels as channels, as many as the scale makes
        pixels = max(1, values["patch_size"] // space.scale) ** 2
        values["adapter_image_channels"] = inferred.image_in // pixels
    for factor in sorted({1, space.raw_patch}):
        try:
            config = replace(base, **values, latent_unpatchify=factor)
        except SettingError:  # sizes that cannot go together: not this space
            continue
        if inferred.difference_from(config) is None:
            return config
    return None


def _build_config(path: Path, inferred: InferredShape, space: LatentSpace) -> PiDConfig:
    if inferred.generation is None:
        raise SettingError(
            f"{path} is built neither like v1 nor like v1.5 (gate {inferred.values['gate']}, injection into "
            f"pixel blocks {inferred.values['inject_pixels']}), so its padding and rotation reference are unknown; "
            "a file of such a network must have its configuration in its metadata."
        )
    config = _released_config(inferred, space)
    if config is None:
        raise CheckpointError(
            f"{path} is not a network for {space.name}: its adapter takes {inferred.latent_in} channels, and latents "
            f"of {space.name} have {space.channels}. Give the space of the file."
        )
    return config
