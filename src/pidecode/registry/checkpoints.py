# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints: files, licenses, schedules, trained sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pidecode.errors import SettingError
from pidecode.registry import configs
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import SPACES, LatentSpace, did_you_mean, get_space

NetworkKind = Literal["feed-forward", "student", "teacher", "backbone"]
PixelSize = tuple[int, int]  # height and width in pixels

REPOSITORY = "nvidia/PiD"  # hub repository of the official weights

TEXT_ENCODER = "Efficient-Large-Model/gemma-2-2b-it"  # of the official code: an ungated copy of google/gemma-2-2b-it

DECODERS: tuple[NetworkKind, ...] = ("student", "feed-forward")  # kinds that a variant without a kind names

Sampler = Literal["sde", "ode"]  # samplers of a student: with fresh noise at every step, or without

STUDENT_TIMES = (0.999, 0.866, 0.634, 0.342, 0.0)
"""Flow times of the distilled 4-step schedule (docs/architecture.md, Schedule and sampling)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class License:
    """License of a file; the license text next to the file is binding."""

    name: str
    title: str
    commercial: bool
    url: str


NSCL_V1 = License(
    name="NSCLv1", title="NVIDIA Source Code License v1 (non-commercial)", commercial=False,
    url="https://huggingface.co/nvidia/PiD",
)  # fmt: skip
APACHE_2 = License(
    name="Apache-2.0", title="Apache License 2.0", commercial=True, url="https://www.apache.org/licenses/LICENSE-2.0"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowShift:
    """A teacher's shift of flow time: `t -> s t / (1 + (s - 1) t)` (docs/architecture.md, Schedule and sampling).

    s = `base * sqrt(sqrt(H W) / size)` for an output of H x W pixels, or `base` alone where `size` is None.
    """

    base: float
    size: int | None = None

    def at(self, height: int, width: int) -> float:
        """The factor s for that output size in pixels."""
        if self.size is None:
            return self.base
        return float(self.base * ((height * width) ** 0.5 / self.size) ** 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One released file of weights (docs/architecture.md, Released files)."""

    space: str  # name of its latent space; "pixeldit" for the backbone, which takes no latent
    variant: str
    kind: NetworkKind
    repository: str | None  # hub repository; None for the weights that ship with this package
    path: str  # path inside the repository, or file name among the package's assets
    config: PiDConfig | None  # the network it holds, as it is used; None where the file itself says it (ours)
    parameters: int | None
    size_bytes: int | None = None  # exact size where known; see `approximate_bytes`
    sha256: str | None = None  # SHA-256 of the file where known; a download that differs is refused
    revision: str | None = None  # commit it is fetched at; None for the main branch, whose commit is recorded
    license: License = NSCL_V1
    shift: FlowShift | None = None  # of its training; teachers and the backbone sample with it
    guidance_scale: float = 1.0  # recommended classifier-free guidance; 1 is none
    num_steps: int = 4  # recommended number of sampling steps
    trained_sizes: tuple[PixelSize, ...] = ()  # as the official notes name them; empty where any is as good
    trained_area: tuple[int, int] | None = None  # smallest and largest in pixels, of training on a range of sizes

    @property
    def bundled(self) -> bool:
        """Whether it ships with this package."""
        return self.repository is None

    @property
    def name(self) -> str:
        """A short name: space and variant, and the kind of teachers and the backbone."""
        return f"{self.space}/{self.variant}" + ("" if self.kind in DECODERS else f"/{self.kind}")

    @property
    def latent_space(self) -> LatentSpace | None:
        """The row of its latent space; None for the backbone."""
        return SPACES.get(self.space)

    @property
    def approximate_bytes(self) -> int | None:
        """Its size, exact where known, else two bytes for each parameter."""
        if self.size_bytes is not None or self.parameters is None:
            return self.size_bytes
        return 2 * self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFile:
    """What turns an image into latents of one space, in a repository."""

    path: str  # a file, or a folder where it ends in "/"
    repository: str = REPOSITORY
    source: str | None = None  # the public model the encoder is
    statistics: tuple[str, str] | None = None  # repository and path of normalization statistics that lie elsewhere


_SIZES_2K: tuple[PixelSize, ...] = ((2048, 2048), (1728, 2304), (2304, 1728), (1536, 2688), (2688, 1536))
# The range variants were trained on buckets of the same shapes from 2048 to about 4096 pixels; the upper
# ones named here are those shapes with a long side of 4096.
_SIZES_4K: tuple[PixelSize, ...] = (*_SIZES_2K, (4096, 4096), (3072, 4096), (4096, 3072), (2304, 4096), (4096, 2304))
_AREA_4K = (1536 * 2688, 4096 * 4096)

_SHIFT_2K = FlowShift(base=6.0)
_SHIFT_V1_4K = FlowShift(base=4.0, size=1024)
V1PT5_SHIFT = FlowShift(base=6.0, size=2048)


_FILE = "checkpoints/{}/model_ema_bf16.pth"


def _v1(space: str, variant: str, parameters: int, size_bytes: int | None = None) -> Checkpoint:
    row, sizes = SPACES[space], _SIZES_2K if variant == "2k" else _SIZES_4K
    return Checkpoint(
        space=space, variant=variant, kind="student", repository=REPOSITORY,
        path=_FILE.format(f"PiD_res{variant}_sr{row.scale}x_official_{space}_distill_4step"),
        config=configs.v1(latent_channels=row.channels, latent_down=row.down, scale=row.scale),
        parameters=parameters, size_bytes=size_bytes, shift=_SHIFT_2K if variant == "2k" else _SHIFT_V1_4K,
        trained_sizes=((2048, 2048),) if row.fixed_input else sizes,
        trained_area=_AREA_4K if variant == "2kto4k" else None,
    )  # fmt: skip


def _v1pt5(space: str, parameters: int, size_bytes: int | None = None, *, teacher: bool = False) -> Checkpoint:
    row, ending = SPACES[space], "undistilled" if teacher else "distill_4step"
    config = configs.v1pt5(
        latent_channels=row.channels, latent_down=row.down, latent_unpatchify=row.raw_patch, color_head=teacher
    )
    return Checkpoint(
        space=space, variant="2kto4k_v1pt5", kind="teacher" if teacher else "student", repository=REPOSITORY,
        path=_FILE.format(f"PiD_v1pt5_res2kto4k_sr4x_official_{space}_{ending}"),
        config=config, parameters=parameters, size_bytes=size_bytes,
        shift=V1PT5_SHIFT, guidance_scale=5.0 if teacher else 1.0, num_steps=25 if teacher else 4,
        trained_sizes=_SIZES_4K, trained_area=_AREA_4K,
    )  # fmt: skip


# The first variant of a space is its default, as in the official tools.
_ROWS = (
    _v1("flux", "2k", 1_362_348_170, 2_724_842_961),
    _v1pt5("flux", 1_400_199_315, 2_800_546_587),
    _v1pt5("flux", 1_401_300_163, teacher=True),
    _v1("flux2", "2k", 1_362_864_266),
    _v1pt5("flux2", 1_400_346_771, 2_800_841_499),
    _v1pt5("flux2", 1_401_447_619, teacher=True),
    _v1("sd3", "2k", 1_362_348_170),
    _v1("sd3", "2kto4k", 1_362_348_170),
    _v1("sdxl", "2kto4k", 1_362_292_874),
    _v1pt5("qwenimage", 1_400_199_315, 2_800_546_587),
    _v1pt5("qwenimage", 1_401_300_163, teacher=True),
    _v1("dinov2", "2k", 1_365_813_386),
    _v1("siglip", "2k", 1_367_582_858),
    Checkpoint(
        space="pixeldit", variant="2kto4k", kind="backbone", repository=REPOSITORY,
        path=_FILE.format("PixelDiT_finetune_2kto4k"), config=configs.backbone(), parameters=1_302_470_787,
        shift=V1PT5_SHIFT, guidance_scale=2.75, num_steps=50, trained_sizes=_SIZES_4K, trained_area=_AREA_4K,
    ),
    Checkpoint(
        space="flux2", variant="tiny", kind="feed-forward", repository=None, path="tiny.safetensors", config=None,
        parameters=None, license=APACHE_2,
    ),
)  # fmt: skip

CHECKPOINTS: Mapping[tuple[str, str, NetworkKind], Checkpoint] = MappingProxyType(
    {(row.space, row.variant, row.kind): row for row in _ROWS}
)
"""Every released file by (space, variant, kind)."""

ENCODERS: Mapping[str, EncoderFile] = MappingProxyType(
    {
        "flux": EncoderFile(path="checkpoints/ae.safetensors"),
        "sd3": EncoderFile(path="checkpoints/sd3_vae/vae/diffusion_pytorch_model.safetensors"),
        "sdxl": EncoderFile(path="checkpoints/sdxl_vae.safetensors"),
        "flux2": EncoderFile(path="checkpoints/flux2_ae.safetensors"),
        "qwenimage": EncoderFile(path="checkpoints/QwenImage_VAE_2d.pth"),
        "dinov2": EncoderFile(
            path="checkpoints/rae/", source="facebook/dinov2-with-registers-base",
            statistics=("nyu-visionx/RAE-collections", "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
        ),
        "siglip": EncoderFile(path="checkpoints/scale_rae/", source="google/siglip2-so400m-patch14-224"),
    }
)  # fmt: skip
"""The official encoder files by latent space. They keep their own licenses."""

TINY_ENCODER = "tiny_encoder.safetensors"  # among the package's assets: the small encoder to FLUX.2's space


def variants(space: str, *kinds: NetworkKind) -> tuple[str, ...]:
    """Variants of a space (name, alias or "pixeldit"), the default first, of some kinds; by default of `DECODERS`."""
    name = space if space == "pixeldit" else get_space(space).name
    return tuple(row.variant for row in _ROWS if row.space == name and row.kind in (kinds or DECODERS))


def get_checkpoint(space: str, variant: str | None = None, kind: NetworkKind | None = None) -> Checkpoint:
    """The released file for a space (name or alias, or "pixeldit" or "tiny"); without a variant, its default.

    Without a kind it is a student or feed-forward decoder ("backbone" for "pixeldit").

    Raises:
        SettingError: There is none; the message says what there is.
    """
    if space == "tiny":
        space, variant = "flux2", "tiny" if variant is None else variant
    name = space if space == "pixeldit" else get_space(space).name
    kinds: tuple[NetworkKind, ...] = (kind,) if kind else ("backbone",) if name == "pixeldit" else DECODERS
    there = variants(name, *kinds)
    if not there:
        raise SettingError(
            f"There is no {kinds[0]} for {name}. Teachers exist for "
            f"{', '.join(sorted({row.space for row in _ROWS if row.kind == 'teacher'}))}; "
            "the backbone is called pixeldit."
        )
    chosen = there[0] if variant is None else variant
    for of_kind in kinds:
        if (name, chosen, of_kind) in CHECKPOINTS:
            return CHECKPOINTS[name, chosen, of_kind]
    raise SettingError(f"There is no {kinds[0]} {chosen!r} for {name}.{did_you_mean(chosen, there)}")


def list_checkpoints() -> list[dict[str, Any]]:
    """The released checkpoints as plain records.

    Returns:
        One dict per file: name, space, variant, kind, repository (None if it ships with the package), path,
        parameters, size_bytes, license, commercial_use, num_steps, guidance_scale, trained_sizes (width, height).
    """
    return [
        {
            "name": row.name, "space": row.space, "variant": row.variant, "kind": row.kind,
            "repository": row.repository, "path": row.path, "parameters": row.parameters,
            "size_bytes": row.approximate_bytes, "license": row.license.name,
            "commercial_use": row.license.commercial, "num_steps": row.num_steps,
            "guidance_scale": row.guidance_scale,
            "trained_sizes": [(width, height) for height, width in row.trained_sizes],
        }
        for row in _ROWS
    ]  # fmt: skip


# A range variant is judged trained up to these bounds: its buckets stop short of them by a few per cent.
_AREA_TOLERANCE = 0.05
_LONGEST_SIDE = 4096
_WIDEST_ASPECT = 1.8


def is_trained(checkpoint: Checkpoint, height: int, width: int) -> bool:
    """Whether the output size is among those the checkpoint was trained for (True where any size is as good)."""
    if not checkpoint.trained_sizes or (height, width) in checkpoint.trained_sizes:
        return True
    if checkpoint.trained_area is None:
        return False
    least, most = checkpoint.trained_area
    aspect = max(height, width) / min(height, width)
    return (
        least * (1 - _AREA_TOLERANCE) <= height * width <= most
        and max(height, width) <= _LONGEST_SIDE
        and aspect <= _WIDEST_ASPECT
    )


def size_warning(checkpoint: Checkpoint, height: int, width: int) -> str | None:
    """A sentence to warn with where an output size is outside what the checkpoint was trained for, else None."""
    if is_trained(checkpoint, height, width):
        return None

    def distance(size: PixelSize) -> float:
        shape = abs(math.log(size[0] * width / (size[1] * height)))
        return 2 * shape + abs(math.log(size[0] * size[1] / (height * width))) / 2

    nearest = min(checkpoint.trained_sizes, key=distance)
    return (
        f"{checkpoint.name} was not trained for {height}x{width} pixels (height x width): colors and textures may "
        f"suffer. The nearest trained size is {nearest[0]}x{nearest[1]}."
    )
