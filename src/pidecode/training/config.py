# SPDX-License-Identifier: Apache-2.0
"""Configuration of a training run as frozen dataclasses, and overriding single fields from the command line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import reprlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from pidecode.errors import SettingError
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import LatentSpace
from pidecode.training.dmd import DistillationConfig
from pidecode.training.flow_matching import TeacherLossConfig
from pidecode.training.noise import LatentNoiseConfig

EncodeFn = Callable[[Tensor], Tensor]
"""Low-resolution images `[B, 3, h, w]` in [-1, 1] to normalized latents `[B, C, h / down, w / down]`."""

EncodeTextFn = Callable[[Sequence[str]], Tensor]
"""Captions to text states `[B, N, text_dim]`."""

MAX_WORKERS, MAX_BATCH_SIZE = 256, 65536  # beyond them a number is a slip, and threads or memory run out

TrainMethod = Literal["backbone", "teacher", "student", "direct"]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise SettingError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Training images and how batches are made of them."""

    source: str = ""
    """A folder of images or of WebDataset shards (.tar), searched with its subfolders; or one shard."""
    sizes: tuple[tuple[int, int], ...] = ((2048, 2048), (2304, 1728), (1728, 2304), (2688, 1536), (1536, 2688))
    """Bucket sizes (height, width); each image is resized to the one nearest its aspect ratio."""
    crop: int = 0
    """Side in pixels of the square crop that is trained on, cut from image and latent alike; 0 uses whole images."""
    batch_size: int = 1
    """Images per process and forward pass."""
    num_workers: int = 4
    """Threads that read images ahead."""
    encoder: str = ""
    """File or folder of the latent space's encoder; empty uses the installed one."""
    cache: str = ""
    """Folder in which latents of whole images are cached; empty encodes every time."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one."""
    latent_dropout: float = 0.1
    """Share of latents replaced by zeros."""

    def __post_init__(self) -> None:
        _check(bool(self.sizes), "data.sizes is empty; give at least one (height, width).")
        _check(
            1 <= self.batch_size <= MAX_BATCH_SIZE,
            f"data.batch_size is {self.batch_size}; it must be at least 1 and at most {MAX_BATCH_SIZE}.",
        )
        _check(
            1 <= self.num_workers <= MAX_WORKERS,
            f"data.num_workers is {self.num_workers}; it must be at least 1 and at most {MAX_WORKERS}.",
        )
        for name in ("caption_dropout", "latent_dropout"):
            share = getattr(self, name)
            _check(0 <= share <= 1, f"data.{name} is {share}; it must lie within 0 and 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for weight matrices and convolution kernels with Adam for the rest."""
    lr: float = 1e-5
    """Learning rate of the trained network."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moments."""
    weight_decay: float = 0.0
    """Weight decay of the trained network."""
    max_grad_norm: float = 0.1
    """Gradients of a module are scaled down to this norm."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows linearly from 0."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or a cosine to 0 at the last step."""
    grad_accumulation: int = 1
    """Forward passes per optimizer step."""

    def __post_init__(self) -> None:
        _check(self.name in ("adamw", "muon"), f"optimizer.name is {self.name!r}; it must be 'adamw' or 'muon'.")
        _check(self.lr > 0, f"optimizer.lr is {self.lr}; it must be positive.")
        _check(self.max_grad_norm > 0, f"optimizer.max_grad_norm is {self.max_grad_norm}; it must be positive.")
        _check(
            self.grad_accumulation >= 1,
            f"optimizer.grad_accumulation is {self.grad_accumulation}; it must be at least 1.",
        )
        _check(
            self.lr_schedule in ("constant", "cosine"),
            f"optimizer.lr_schedule is {self.lr_schedule!r}; it must be 'constant' or 'cosine'.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EMAConfig:
    """Exponential moving average (EMA) of the weights, which is what samples and exports use."""

    kind: Literal["power", "constant", "none"] = "power"
    """Profile: a power of training time (https://arxiv.org/abs/2312.02696), a constant decay, or no average."""
    sigma_rel: float = 0.1
    """Width of the power profile relative to training time."""
    decay: float = 0.9999
    """Decay per step of the constant profile; the first steps use `(1 + step) / (10 + step)` where that is less."""

    def __post_init__(self) -> None:
        _check(self.kind in ("power", "constant", "none"), f"ema.kind is {self.kind!r}: power, constant or none.")
        _check(0 < self.sigma_rel < 0.28, f"ema.sigma_rel is {self.sigma_rel}; it must lie between 0 and 0.28.")
        _check(0 <= self.decay < 1, f"ema.decay is {self.decay}; it must lie within 0 and 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters instead of full fine-tuning (needs peft; https://arxiv.org/abs/2106.09685)."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float = 0.0
    """Scale times rank; 0 means equal to the rank."""
    targets: tuple[str, ...] = ("attention", "mlp", "pixel_mlp")
    """Adapted layers: attention and feed-forward of the image stream, feed-forward of the pixel blocks."""

    def __post_init__(self) -> None:
        _check(self.rank >= 0, f"lora.rank is {self.rank}; it must not be negative.")
        known = {"attention", "mlp", "pixel_mlp"}
        _check(set(self.targets) <= known, f"lora.targets is {self.targets}; choose among {', '.join(sorted(known))}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Parallelism over processes started by torchrun."""

    weights: Literal["replicate", "shard"] = "replicate"
    """Whole networks in every process (DDP), or a shard of each tensor (FSDP2)."""
    context_parallel: int = 1
    """Processes that share one image, each with a range of its patch rows."""
    timeout: float = 600.0
    """Seconds without an answer after which another process counts as lost."""

    def __post_init__(self) -> None:
        _check(self.weights in ("replicate", "shard"), f"parallel.weights is {self.weights!r}: 'replicate' or 'shard'.")
        _check(
            self.context_parallel >= 1, f"parallel.context_parallel is {self.context_parallel}; it must be at least 1."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Length and precision of a run, and what is written when."""

    steps: int = 1000
    """Optimizer steps (in a distillation: iterations of either phase)."""
    seed: int = 0
    """Seed of initial weights, data order and every random draw."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Autocast dtype; weights and optimizer state are always float32."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a killed run loses at most this many."""
    checkpoint_minutes: float = 0.0
    """Write a checkpoint also when this many minutes have passed since the last one; 0 counts steps alone."""
    keep: int = 2
    """Newest checkpoints kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 500
    """Steps between grids of samples; 0 writes none."""
    num_samples: int = 4
    """Images in a grid."""
    trackers: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl: "tensorboard", "wandb"."""

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "keep", "log_every", "num_samples"):
            _check(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; it must be at least 1.")
        _check(0 <= self.seed < 2**63, f"run.seed is {self.seed}; it must be at least 0 and below 2^63.")
        _check(self.checkpoint_minutes >= 0, f"run.checkpoint_minutes is {self.checkpoint_minutes}; at least 0.")
        _check(
            self.precision in ("bfloat16", "float32"),
            f"run.precision is {self.precision!r}; it must be 'bfloat16' or 'float32'.",
        )
        _check(
            set(self.trackers) <= {"tensorboard", "wandb"},
            f"run.trackers is {self.trackers}; known are 'tensorboard' and 'wandb'.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PiDRunConfig(RunConfig):
    """The same with what only runs of PiD networks have."""

    activation_checkpointing: bool = True
    """Recompute each block's activations in the backward pass instead of storing them."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the exported weights."""
    sample_steps: int = 25
    """Solver steps of a teacher's samples; students use their own times."""
    sample_guidance: float = 5.0
    """Classifier-free guidance scale of a teacher's samples."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)  # super() does not work in dataclasses with slots
        _check(self.sample_steps >= 1, f"run.sample_steps is {self.sample_steps}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run of a PiD network: everything that decides it besides the images themselves."""

    title: str
    """What is trained, in one line."""
    method: TrainMethod
    """backbone: text to image; teacher: many guided steps; student: distilled to few steps; direct: few steps by a
    reconstruction loss."""
    net: PiDConfig
    """The network."""
    space: LatentSpace | None = None
    """Latent space that is decoded; None for a backbone."""
    encode: EncodeFn | None = None
    """Encoder of low-resolution images; None uses the latent space's own."""
    encode_text: EncodeTextFn | None = None
    """Text encoder; None uses Gemma-2. Unused by networks without a text stream."""
    negative_prompt: str = ""
    """Negative prompt of classifier-free guidance."""
    init_from: str = ""
    """Initial weights: a file, or the name of an installed model. Empty initializes randomly."""
    trainable: Literal["all", "adapter"] = "all"
    """What is trained: everything, or the latent adapter and its gates with the backbone frozen."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and batches."""
    noise: LatentNoiseConfig = field(default_factory=LatentNoiseConfig)
    """Noise added to latents."""
    teacher: TeacherLossConfig = field(default_factory=TeacherLossConfig)
    """Loss of backbones and teachers."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Distillation of students; its times and kind of input also serve the direct method."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Moving average of the weights."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes."""
    run: PiDRunConfig = field(default_factory=PiDRunConfig)
    """Length, precision and outputs."""

    def __post_init__(self) -> None:
        _check(
            self.method in ("backbone", "teacher", "student", "direct"),
            f"method is {self.method!r}; it must be backbone, teacher, student or direct.",
        )
        _check(
            (self.method == "backbone") == (not self.net.has_adapter),
            "A backbone is a network without an adapter (latent_channels=0); every other method needs one.",
        )
        _check(self.method == "backbone" or self.space is not None, "This method decodes latents; name their space.")
        _check(self.trainable in ("all", "adapter"), f"trainable is {self.trainable!r}; it must be 'all' or 'adapter'.")
        _check(
            self.trainable == "all" or self.method == "teacher",
            "trainable='adapter' freezes the backbone, which is the teacher's first stage; it needs method='teacher'.",
        )
        if self.space is not None:
            self._check_space(self.space)
        self._check_sizes()

    def _check_space(self, space: LatentSpace) -> None:
        have = (self.net.latent_channels, self.net.latent_down, self.net.scale)
        want = (space.channels, space.down, space.scale)
        _check(
            have == want,
            f"The network reads latents of {have[0]} channels at 1/{have[1]}, times {have[2]}; "
            f"space {space.name!r} has {want[0]} at 1/{want[1]}, times {want[2]}.",
        )

    def _check_sizes(self) -> None:
        unit = self.unit
        sizes = [*self.data.sizes, *(((self.data.crop, self.data.crop),) if self.data.crop else ())]
        for height, width in sizes:
            _check(
                height > 0 and width > 0 and height % unit == 0 and width % unit == 0,
                f"An image of {height}x{width} does not divide into units of {unit} pixels "
                "(a patch and a latent cell must both fit); change data.sizes or data.crop.",
            )
        for height, width in self.data.sizes:
            _check(
                self.data.crop <= min(height, width),
                f"data.crop is {self.data.crop}, larger than images of {height}x{width}.",
            )

    @property
    def unit(self) -> int:
        """Pixels that sides of images and crops must be multiples of: whole patches and whole latent cells."""
        patch = self.net.patch_size
        if self.space is None:
            return patch
        cell = self.space.pixels_per_cell
        return max(patch, cell) if max(patch, cell) % min(patch, cell) == 0 else patch * cell


R = TypeVar("R")


class FieldDoc(NamedTuple):
    """One field of a configuration: dotted name, value, and its description."""

    name: str
    value: Any
    words: str


def apply_settings(config: R, settings: Sequence[str]) -> R:
    """`config` with every `name=value` of `settings` applied in turn.

    Raises:
        SettingError: A name does not exist (the closest is named) or a value has the wrong type.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise SettingError(f"{setting!r} is no setting; write name=value, for instance data.batch_size=4.")
        config = _with(config, name.strip(), name.strip().split("."), text.strip())
    return config


def _with(record: Any, full_name: str, path: list[str], text: str) -> Any:
    name, rest = path[0], path[1:]
    known = [field.name for field in fields(record)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingError(f"There is no setting {full_name!r}.{hint} Known here are {', '.join(known)}.")
    current = getattr(record, name)
    if rest:
        if not is_dataclass(current):
            raise SettingError(f"{full_name!r} goes too deep: {name} is a single value.")
        return replace(record, **{name: _with(current, full_name, rest, text)})
    if is_dataclass(current):
        inner = ", ".join(f"{full_name}.{field.name}" for field in fields(current)[:3])
        raise SettingError(f"{full_name!r} is a group of settings; set one of them ({inner}, ...).")
    hint = get_type_hints(type(record))[name]
    return replace(record, **{name: _read(full_name, text, hint)})


def _read(name: str, text: str, hint: Any) -> Any:
    for value in _readings(text):
        fitted = _fit(value, hint)
        if fitted is not _MISFIT:
            return fitted
    raise SettingError(f"{name} cannot be {reprlib.repr(text)}; it must be {_plain(hint)}.")


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
    """The sentence under each field of a dataclass, read from its source."""
    words: dict[str, str] = {}
    for parent in reversed([kind for kind in record_type.__mro__ if is_dataclass(kind)]):
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                words[node.target.id] = " ".join(str(text).split())
    return words


def describe(record: Any, prefix: str = "") -> Iterator[FieldDoc]:
    """Every field of a configuration and of those nested in it, in order."""
    kind: type = type(record)
    words = field_words(kind)
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from describe(value, f"{prefix}{item.name}.")
        else:
            yield FieldDoc(prefix + item.name, value, words.get(item.name, ""))
