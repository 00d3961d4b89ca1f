# SPDX-License-Identifier: Apache-2.0
"""A training run as one frozen record: what is trained, on what, how, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from pidecode.errors import SettingError
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import LatentSpace
from pidecode.training.dmd import Distillation
from pidecode.training.flow_matching import TeacherLoss
from pidecode.training.noise import LatentNoise

Encode = Callable[[Tensor], Tensor]
"""Low-resolution images `[B, 3, h, w]` in [-1, 1] to normalized latents `[B, C, h / down, w / down]`."""

EncodeText = Callable[[Sequence[str]], Tensor]
"""Captions to states `[B, N, width]`."""

Method = Literal["backbone", "teacher", "student", "direct"]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise SettingError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Images and what goes with them."""

    source: str = ""
    """A folder of images or of WebDataset shards (.tar), searched with its subfolders; or one shard."""
    sizes: tuple[tuple[int, int], ...] = ((2048, 2048), (2304, 1728), (1728, 2304), (2688, 1536), (1536, 2688))
    """Sizes (height, width) that images are brought to; each goes to the one nearest its own aspect ratio."""
    crop: int = 0
    """Side in pixels of the square trained on, cut from such an image and its latent alike; 0 takes all of it."""
    batch: int = 1
    """Images per process and forward pass."""
    workers: int = 4
    """Threads that read images ahead."""
    encoder: str = ""
    """File or folder of the latent space's encoder; empty takes the one on this disk."""
    cache: str = ""
    """Folder in which latents of whole images are kept, so that each is encoded once; empty encodes each time."""
    caption_drop: float = 0.1
    """Share of captions replaced by the empty one."""
    latent_drop: float = 0.1
    """Share of latents replaced by zeros."""

    def __post_init__(self) -> None:
        _check(bool(self.sizes), "data.sizes is empty; give at least one (height, width).")
        _check(self.batch >= 1, f"data.batch is {self.batch}; it must be at least 1.")
        _check(self.workers >= 1, f"data.workers is {self.workers}; it must be at least 1.")
        for name in ("caption_drop", "latent_drop"):
            share = getattr(self, name)
            _check(0 <= share <= 1, f"data.{name} is {share}; it must lie within 0 and 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimize:
    """AdamW, and what happens around its step."""

    rate: float = 1e-5
    """Learning rate of the network that is trained."""
    critic_rate: float = 1e-5
    """Learning rate of fake score and critic in a distillation."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging of gradients and of their squares."""
    decay: float = 0.0
    """Weight decay of the network that is trained."""
    fake_decay: float = 1e-3
    """Weight decay of the fake score."""
    clip: float = 0.1
    """Largest norm of a network's gradient; longer ones are shortened to it."""
    warmup: int = 0
    """Steps over which the rate grows from 0."""
    fall: Literal["none", "cosine"] = "none"
    """Whether the rate then stays, or falls to 0 at the last step."""
    accumulate: int = 1
    """Forward passes whose gradients make one step."""

    def __post_init__(self) -> None:
        _check(self.rate > 0 and self.critic_rate > 0, "Learning rates must be positive.")
        _check(self.clip > 0, f"optimize.clip is {self.clip}; it must be positive.")
        _check(self.accumulate >= 1, f"optimize.accumulate is {self.accumulate}; it must be at least 1.")
        _check(self.fall in ("none", "cosine"), f"optimize.fall is {self.fall!r}; it must be 'none' or 'cosine'.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """The moving average of the weights, which is what is exported."""

    kind: Literal["power", "constant", "none"] = "power"
    """Profile: a power of training time, a constant decay, or none."""
    rate: float = 0.1
    """Width of the power profile as a share of training time."""
    decay: float = 0.9999
    """Decay per step of the constant profile."""

    def __post_init__(self) -> None:
        _check(self.kind in ("power", "constant", "none"), f"average.kind is {self.kind!r}; see its choices.")
        _check(0 < self.rate < 0.28, f"average.rate is {self.rate}; it must lie between 0 and 0.28.")
        _check(0 <= self.decay < 1, f"average.decay is {self.decay}; it must lie within 0 and 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapt:
    """Low-rank adapters instead of whole weights (needs peft)."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float = 0.0
    """Their strength times the rank; 0 means equal to the rank."""
    where: tuple[str, ...] = ("attention", "mlp", "pixel_mlp")
    """Parts adapted: the image stream's attention and feed-forward, and the pixel blocks' feed-forward."""

    def __post_init__(self) -> None:
        _check(self.rank >= 0, f"adapt.rank is {self.rank}; it must not be negative.")
        known = {"attention", "mlp", "pixel_mlp"}
        _check(set(self.where) <= known, f"adapt.where is {self.where}; choose among {', '.join(sorted(known))}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How the work is spread over processes started by torchrun."""

    weights: Literal["copied", "sharded"] = "copied"
    """Every process holds whole networks (DDP), or a part of each tensor (FSDP2)."""
    across: int = 1
    """Processes that share one image, each with a band of its patch rows (sequence parallelism)."""
    patience: float = 600.0
    """Seconds without an answer after which another process counts as lost."""

    def __post_init__(self) -> None:
        _check(self.weights in ("copied", "sharded"), f"spread.weights is {self.weights!r}: 'copied' or 'sharded'.")
        _check(self.across >= 1, f"spread.across is {self.across}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Length, precision, and what is written when."""

    steps: int = 1000
    """Optimizer steps (in a distillation: iterations of either phase)."""
    seed: int = 0
    """Decides start values, the order of images and every draw."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of matrix products; weights, sums and optimizer are always float32."""
    recompute: bool = True
    """Recompute each block's activations in the backward pass instead of keeping them."""
    save_every: int = 500
    """Steps between checkpoints; a killed run loses at most this many."""
    keep: int = 2
    """Newest checkpoints kept."""
    export_as: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the exported weights."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 500
    """Steps between grids of samples; 0 draws none."""
    samples: int = 4
    """Images in a grid."""
    sample_steps: int = 25
    """Solver steps of a teacher's samples; students use their own times."""
    sample_guidance: float = 5.0
    """Guidance of a teacher's samples."""
    track: tuple[str, ...] = ()
    """Also write metrics to "tensorboard" or "wandb"."""

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep", "log_every", "samples", "sample_steps"):
            _check(getattr(self, name) >= 1, f"run.{name} is {getattr(self, name)}; it must be at least 1.")
        _check(self.precision in ("bfloat16", "float32"), f"run.precision is {self.precision!r}.")
        _check(set(self.track) <= {"tensorboard", "wandb"}, f"run.track is {self.track}: 'tensorboard', 'wandb'.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a training run besides the images themselves."""

    title: str
    """What this trains, in one line."""
    method: Method
    """backbone: text to image; teacher: many guided steps; student: distilled to a few; direct: few steps, simply."""
    net: PiDConfig
    """The network."""
    space: LatentSpace | None = None
    """Latent space it decodes; None for a backbone."""
    encode: Encode | None = None
    """How a low-resolution image becomes a latent; None takes the space's own encoder."""
    encode_text: EncodeText | None = None
    """How captions become states; None takes Gemma-2. Unused by networks without a text stream."""
    negative: str = ""
    """Caption that guidance leads away from."""
    start_from: str = ""
    """Weights to start from: a file, or the name of a model on this disk. Empty starts from chance."""
    only: Literal["all", "adapter"] = "all"
    """What is trained: everything, or the latent's adapter and gates with the backbone frozen."""
    data: Data = field(default_factory=Data)
    """Images."""
    noise: LatentNoise = field(default_factory=LatentNoise)
    """Noising of latents."""
    teacher: TeacherLoss = field(default_factory=TeacherLoss)
    """Loss of backbones and teachers."""
    distil: Distillation = field(default_factory=Distillation)
    """Distillation of students; its times and kind of input also serve the direct method."""
    optimize: Optimize = field(default_factory=Optimize)
    """Optimizer."""
    average: Average = field(default_factory=Average)
    """Moving average of the weights."""
    adapt: Adapt = field(default_factory=Adapt)
    """Low-rank adapters."""
    spread: Spread = field(default_factory=Spread)
    """Many processes."""
    run: Run = field(default_factory=Run)
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
        _check(self.only in ("all", "adapter"), f"only is {self.only!r}; it must be 'all' or 'adapter'.")
        _check(
            self.only == "all" or self.method == "teacher",
            "only='adapter' keeps a backbone frozen, which is the teacher's first stage; it needs method='teacher'.",
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
