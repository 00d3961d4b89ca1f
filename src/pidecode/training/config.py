# SPDX-License-Identifier: Apache-2.0
"""Configuration of a training run as frozen dataclasses, and overriding single fields from the command line."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import math
import reprlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise, takewhile
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from pidecode.errors import SettingError
from pidecode.registry.checkpoints import STUDENT_TIMES, FlowShift
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import LatentSpace, did_you_mean

EncodeFn = Callable[[Tensor], Tensor]
"""Low-resolution images `[B, 3, h, w]` in [-1, 1] to normalized latents `[B, C, h / down, w / down]`."""

EncodeTextFn = Callable[[Sequence[str]], Tensor]  # captions to text states `[B, N, text_dim]`

MAX_WORKERS, MAX_BATCH_SIZE = 256, 65536  # beyond them a number is a slip, and threads or memory run out

_FROM_0, _FROM_1 = (0, math.inf), (1, math.inf)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise SettingError(message)


def _check_fields(record: Any, section: str = "", **bounds: tuple[float, float]) -> None:
    """Check fields with choices against those, and numbers against their bounds (both included)."""
    for name, hint in get_type_hints(type(record)).items():
        value, one = getattr(record, name), get_args(hint)[0] if get_origin(hint) is tuple else hint
        if get_origin(one) is Literal:
            _check(_fit(value, hint) is not _MISFIT, f"{section}{name} is {value!r}; it must be {_plain(hint)}.")
        if name in bounds:
            low, high = bounds[name]
            most = f" and at most {high}" if high < math.inf else ""
            _check(low <= value <= high, f"{section}{name} is {value}; it must be at least {low}{most}.")


def _check_positive(record: Any, section: str, *names: str) -> None:
    for name in names:
        _check(getattr(record, name) > 0, f"{section}{name} is {getattr(record, name)}; it must be positive.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Training images and how batches are made of them."""

    source: str = ""  # a folder of images or of WebDataset shards (.tar), searched with its subfolders; or one shard
    # Bucket sizes (height, width); each image is resized to the one nearest its aspect ratio.
    sizes: tuple[tuple[int, int], ...] = ((2048, 2048), (2304, 1728), (1728, 2304), (2688, 1536), (1536, 2688))
    # Side in pixels of the square crop that is trained on, cut from image and latent alike; 0 uses whole images.
    crop: int = 0
    batch_size: int = 1  # images per process and forward pass
    num_workers: int = 4  # threads that read images ahead
    encoder: str = ""  # file or folder of the latent space's encoder; empty uses the installed one
    cache: str = ""  # folder in which latents of whole images are cached; empty encodes every time
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    latent_dropout: float = 0.1  # share of latents replaced by zeros

    def __post_init__(self) -> None:
        _check(bool(self.sizes), "data.sizes is empty; give at least one (height, width).")
        _check_fields(
            self, "data.", batch_size=(1, MAX_BATCH_SIZE), num_workers=(1, MAX_WORKERS), crop=_FROM_0,
            caption_dropout=(0, 1), latent_dropout=(0, 1),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentNoiseConfig:
    """Noise added to latents, so that the network learns to decode unfinished ones."""

    probability: float = 0.75  # share of samples that are noised at all
    clean_probability: float = 0.0  # share of those that stay clean after all, as in the released recipes
    sigma_min: float = 0.0  # smallest sigma drawn
    sigma_max: float = 0.8  # largest sigma drawn
    # Other ranges for some samples: (part of the file name, sigma_min, sigma_max); the first match counts.
    by_name: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        for part, low, high in (("", self.sigma_min, self.sigma_max), *self.by_name):
            of = f" for names with {part!r}" if part else ""
            message = f"Latent noise{of} runs from {low} to {high}; it must lie within 0 and 1, in order."
            _check(0 <= low <= high <= 1, message)
        _check_fields(self, "noise.", probability=(0, 1), clean_probability=(0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLossConfig:
    """Loss of a teacher or backbone."""

    shift: float = 6.0  # flow shift: moves training times toward noise, as large images need
    # Side in pixels at which `shift` holds; it grows with the square root of the area. None: constant.
    shift_base_size: int | None = 2048
    color_weight: float = 0.8  # weight of the color loss; acts only on networks with a color head
    repa_weight: float = 0.0  # weight of representation alignment (REPA); needs `repa_encoder`
    repa_block: int = 6  # patch block whose tokens are aligned
    repa_encoder: str = ""  # folder of the DINOv2 encoder

    def __post_init__(self) -> None:
        _check_positive(self, "teacher.", "shift")
        _check(
            bool(self.repa_encoder) or not self.repa_weight,
            "teacher.repa_weight is set but teacher.repa_encoder is not; name the folder of a DINOv2.",
        )

    @property
    def flow_shift(self) -> FlowShift:
        """The shift as a rule of the image's size."""
        return FlowShift(base=self.shift, size=self.shift_base_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig:
    """How a teacher is distilled into a student."""

    # One iteration in this many trains the student; the others the fake score and the discriminator.
    student_every: int = 6
    # What the student starts from: a noised real image, or its own rollout from pure noise (as when decoding).
    student_input: Literal["teacher_forcing", "self_rollout"] = "teacher_forcing"
    guidance_scale: float = 3.0  # classifier-free guidance of the teacher
    min_time: float = 0.02  # smallest time at which student images are noised for judging
    max_time: float = 0.99  # largest such time
    fake_score_lr: float = 1e-5  # learning rate of fake score and discriminator
    fake_score_weight_decay: float = 1e-3  # weight decay of the fake score
    gan_weight: float = 0.05  # weight of the adversarial loss of the student; 0 trains without a discriminator
    gan_warmup: int = 100  # iterations over which that weight grows from 0
    r1_weight: float = 200.0  # weight of the discriminator's approximate R1 penalty
    # Standard deviation of the perturbation of real images in it (https://arxiv.org/abs/2501.08316).
    r1_sigma: float = 0.1
    discriminator_blocks: tuple[int, ...] = ()  # teacher blocks the discriminator reads; empty means the middle one
    discriminator_layers: int = 2  # convolutions in each head of the discriminator
    discriminator_per_patch: bool = False  # whether the discriminator judges positions instead of whole images
    times: tuple[float, ...] = STUDENT_TIMES  # times of the student's steps, decreasing, ending in 0

    def __post_init__(self) -> None:
        _check_fields(self, "distillation.", student_every=_FROM_1)
        _check_positive(self, "distillation.", "fake_score_lr")
        _check(
            0 < self.min_time < self.max_time < 1,
            f"Times run from {self.min_time} to {self.max_time}; they must lie within 0 and 1, in order.",
        )
        decreasing = len(self.times) > 1 and self.times[-1] == 0 and all(a > b for a, b in pairwise(self.times))
        _check(decreasing, f"The student's times are {self.times}; they must decrease and end in 0.")

    def is_student_turn(self, step: int) -> bool:
        """Whether iteration `step`, counted from 0, trains the student."""
        return step % self.student_every == 0

    def gan_weight_at(self, step: int) -> float:
        """The discriminator's weight at an iteration, growing linearly through the warm-up."""
        return self.gan_weight * min(1.0, step / self.gan_warmup) if self.gan_warmup else self.gan_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    # AdamW, or Muon for weight matrices and convolution kernels with Adam for the rest.
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-5  # learning rate of the trained network
    betas: tuple[float, float] = (0.9, 0.999)  # decay rates of Adam's first and second moments
    weight_decay: float = 0.0  # weight decay of the trained network
    max_grad_norm: float = 0.1  # gradients of a module are scaled down to this norm
    warmup_steps: int = 0  # steps over which the learning rate grows linearly from 0
    # Learning rate after warm-up: constant, or a cosine to 0 at the last step.
    lr_schedule: Literal["constant", "cosine"] = "constant"
    grad_accumulation: int = 1  # forward passes per optimizer step

    def __post_init__(self) -> None:
        _check_fields(self, "optimizer.", grad_accumulation=_FROM_1)
        _check_positive(self, "optimizer.", "lr", "max_grad_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class EMAConfig:
    """Exponential moving average (EMA) of the weights, which is what samples and exports use."""

    # Profile: a power of training time (https://arxiv.org/abs/2312.02696), a constant decay, or no average.
    kind: Literal["power", "constant", "none"] = "power"
    sigma_rel: float = 0.1  # width of the power profile relative to training time
    # Decay per step of the constant profile; the first steps use `(1 + step) / (10 + step)` where that is less.
    decay: float = 0.9999

    def __post_init__(self) -> None:
        _check_fields(self, "ema.")
        _check(0 < self.sigma_rel < 0.28, f"ema.sigma_rel is {self.sigma_rel}; it must lie between 0 and 0.28.")
        _check(0 <= self.decay < 1, f"ema.decay is {self.decay}; it must lie within 0 and 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters instead of full fine-tuning (needs peft; https://arxiv.org/abs/2106.09685)."""

    rank: int = 0  # rank of the adapters; 0 trains the weights themselves
    alpha: float = 0.0  # scale times rank; 0 means equal to the rank
    # Adapted layers: attention and feed-forward of the image stream, feed-forward of the pixel blocks.
    targets: tuple[Literal["attention", "mlp", "pixel_mlp"], ...] = ("attention", "mlp", "pixel_mlp")

    def __post_init__(self) -> None:
        _check_fields(self, "lora.", rank=_FROM_0)
        _check(bool(self.targets), "lora.targets is empty; name at least one part to adapt.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Parallelism over processes started by torchrun."""

    # Whole networks in every process (DDP), or a shard of each tensor (FSDP2).
    weights: Literal["replicate", "shard"] = "replicate"
    context_parallel: int = 1  # processes that share one image, each with a range of its patch rows
    timeout: float = 600.0  # seconds without an answer after which another process counts as lost

    def __post_init__(self) -> None:
        _check_fields(self, "parallel.", context_parallel=_FROM_1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Length and precision of a run, and what is written when."""

    steps: int = 1000  # optimizer steps (in a distillation: iterations of either phase)
    seed: int = 0  # seed of initial weights, data order and every random draw
    # Autocast dtype; weights and optimizer state are always float32.
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    checkpoint_every: int = 500  # steps between checkpoints; a killed run loses at most this many
    # Write a checkpoint also when this many minutes have passed since the last one; 0 counts steps alone.
    checkpoint_minutes: float = 0.0
    keep: int = 2  # newest checkpoints kept
    log_every: int = 10  # steps between lines of metrics.jsonl
    sample_every: int = 500  # steps between grids of samples; 0 writes none
    num_samples: int = 4  # images in a grid
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # trackers beside metrics.jsonl: "tensorboard", "wandb"

    def __post_init__(self) -> None:
        _check_fields(
            self, "run.", steps=_FROM_1, checkpoint_every=_FROM_1, keep=_FROM_1, log_every=_FROM_1, num_samples=_FROM_1,
            checkpoint_minutes=_FROM_0, sample_steps=_FROM_1,
        )  # fmt: skip
        _check(0 <= self.seed < 2**63, f"run.seed is {self.seed}; it must be at least 0 and below 2^63.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PiDRunConfig(RunConfig):
    """The same with what only runs of PiD networks have."""

    # Recompute each block's activations in the backward pass instead of storing them.
    activation_checkpointing: bool = True
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of the exported weights
    sample_steps: int = 25  # solver steps of a teacher's samples; students use their own times
    sample_guidance: float = 5.0  # classifier-free guidance scale of a teacher's samples


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run of a PiD network: everything that decides it besides the images themselves."""

    title: str  # what is trained, in one line
    # backbone: text to image; teacher: many guided steps; student: distilled to few steps; direct: few steps by a
    # reconstruction loss.
    method: Literal["backbone", "teacher", "student", "direct"]
    net: PiDConfig  # the network
    space: LatentSpace | None = None  # latent space that is decoded; None for a backbone
    encode: EncodeFn | None = None  # encoder of low-resolution images; None uses the latent space's own
    # Text encoder; None uses Gemma-2. Unused by networks without a text stream.
    encode_text: EncodeTextFn | None = None
    negative_prompt: str = ""  # negative prompt of classifier-free guidance
    init_from: str = ""  # initial weights: a file, or the name of an installed model. Empty initializes randomly.
    # What is trained: everything, or the latent adapter and its gates with the backbone frozen.
    trainable: Literal["all", "adapter"] = "all"
    data: DataConfig = field(default_factory=DataConfig)  # images and batches
    noise: LatentNoiseConfig = field(default_factory=LatentNoiseConfig)  # noise added to latents
    teacher: TeacherLossConfig = field(default_factory=TeacherLossConfig)  # loss of backbones and teachers
    # Distillation of students; its times and kind of input also serve the direct method.
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # optimizer and schedule
    ema: EMAConfig = field(default_factory=EMAConfig)  # moving average of the weights
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # low-rank adapters
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # several processes
    run: PiDRunConfig = field(default_factory=PiDRunConfig)  # length, precision and outputs

    def __post_init__(self) -> None:
        _check_fields(self)
        _check(
            (self.method == "backbone") == (not self.net.has_adapter),
            "A backbone is a network without an adapter (latent_channels=0); every other method needs one.",
        )
        _check(self.method == "backbone" or self.space is not None, "This method decodes latents; name their space.")
        _check(
            self.trainable == "all" or self.method == "teacher",
            "trainable='adapter' freezes the backbone, which is the teacher's first stage; it needs method='teacher'.",
        )
        if self.space is not None:
            have = (self.net.latent_channels, self.net.latent_down, self.net.scale)
            want = (self.space.channels, self.space.down, self.space.scale)
            _check(
                have == want,
                f"The network reads latents of {have[0]} channels at 1/{have[1]}, times {have[2]}; "
                f"space {self.space.name!r} has {want[0]} at 1/{want[1]}, times {want[2]}.",
            )
        unit, crop = self.unit, self.data.crop
        for height, width in (*self.data.sizes, *([(crop, crop)] if crop else [])):
            _check(
                height > 0 and width > 0 and height % unit == 0 and width % unit == 0,
                f"An image of {height}x{width} does not divide into units of {unit} pixels "
                "(a patch and a latent cell must both fit); change data.sizes or data.crop.",
            )
            _check(crop <= min(height, width), f"data.crop is {crop}, larger than images of {height}x{width}.")

    @property
    def unit(self) -> int:
        """Pixels that sides of images and crops must be multiples of: whole patches and whole latent cells."""
        patch, cell = self.net.patch_size, 1 if self.space is None else self.space.pixels_per_cell
        return max(patch, cell) if max(patch, cell) % min(patch, cell) == 0 else patch * cell


R = TypeVar("R")


class FieldDoc(NamedTuple):
    """One field of a configuration: dotted name, value, and its description."""

    name: str
    value: Any
    words: str


def apply_settings(config: R, settings: Sequence[str]) -> R:
    """`config` with every `name=value` of `settings` applied in turn."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        _check(bool(equals), f"{setting!r} is no setting; write name=value, for instance data.batch_size=4.")
        config = _with(config, name.strip(), name.strip().split("."), text.strip())
    return config


def _with(record: Any, full_name: str, path: list[str], text: str) -> Any:
    name, rest = path[0], path[1:]
    known = [field.name for field in fields(record)]
    _check(name in known, f"There is no setting {full_name!r}.{did_you_mean(name, known)}")
    current = getattr(record, name)
    if rest:
        _check(is_dataclass(current), f"{full_name!r} goes too deep: {name} is a single value.")
        return replace(record, **{name: _with(current, full_name, rest, text)})
    if is_dataclass(current):
        inner = ", ".join(f"{full_name}.{field.name}" for field in fields(current)[:3])
        raise SettingError(f"{full_name!r} is a group of settings; set one of them ({inner}, ...).")
    hint = get_type_hints(type(record))[name]
    value = next((fit for fit in (_fit(value, hint) for value in _readings(text)) if fit is not _MISFIT), _MISFIT)
    _check(value is not _MISFIT, f"{full_name} cannot be {reprlib.repr(text)}; it must be {_plain(hint)}.")
    return replace(record, **{name: value})


def _readings(text: str) -> Iterator[Any]:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}
    if text.lower() in words:
        yield words[text.lower()]
    with contextlib.suppress(ValueError, SyntaxError):
        yield ast.literal_eval(text)
    yield text
    yield tuple(part.strip() for part in text.split(",") if part.strip())


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if value in inner else _MISFIT
    if origin in (Union, types.UnionType):
        return next((fit for fit in (_fit(value, option) for option in inner) if fit is not _MISFIT), _MISFIT)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return _MISFIT
        kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        parts = [_fit(part, kind) for part, kind in zip(value, kinds, strict=False)]
        return tuple(parts) if len(kinds) == len(value) and _MISFIT not in parts else _MISFIT
    if hint is float and type(value) is int:
        return float(value)
    if hint is type(None):
        return None if value is None else _MISFIT
    return value if isinstance(hint, type) and type(value) is hint else _MISFIT


def _plain(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_plain(option) for option in inner)
    if origin is tuple:
        return f"a list of {_plain(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


@functools.cache
def field_words(record_type: type) -> dict[str, str]:
    """What is said of each field of a dataclass in its source: a comment on its line or above it, or a text below."""
    words: dict[str, str] = {}
    for parent in reversed([kind for kind in record_type.__mro__ if is_dataclass(kind)]):
        source = inspect.cleandoc("\n" + inspect.getsource(parent))
        lines, body = source.splitlines(), ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                above = takewhile(lambda line: line.startswith("    # "), reversed(lines[: node.lineno - 1]))
                said = [line[6:] for line in above][::-1] or [lines[(node.end_lineno or 1) - 1].partition("  # ")[2]]
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    said = str(after.value.value).split()
                words[node.target.id] = " ".join(said)
    return words


def describe(record: Any, prefix: str = "") -> Iterator[FieldDoc]:
    """Every field of a configuration and of those nested in it, in order."""
    kind: type = type(record)
    words = field_words(kind)
    for item in fields(record):
        value = getattr(record, item.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from describe(value, f"{prefix}{item.name}.")
        else:
            yield FieldDoc(prefix + item.name, value, words.get(item.name, ""))
