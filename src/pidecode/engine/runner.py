# SPDX-License-Identifier: Apache-2.0
"""Runs a PiDNet the way a plan says, and holds what that takes: caches, chunk sizes, offloaded blocks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from pidecode.devices import free_memory, require_compiler, supports_cuda_graphs
from pidecode.engine import inplace
from pidecode.engine.cuda_graphs import GraphCache, capture_on
from pidecode.engine.feed_forward import MEASURED_SIDE, FeedForwardPlan, FeedForwardRunner
from pidecode.engine.inplace import prepare_recomputed
from pidecode.engine.machine import Chunks
from pidecode.engine.offload import BlockOffloader
from pidecode.engine.ops import elementwise
from pidecode.engine.ops.compiled import CompiledOps
from pidecode.engine.ops.quantize import (
    EIGHT_BIT_HEADS,
    EIGHT_BIT_TOLERANCE,
    EightBitAttention,
    best_kernel,
    int8_kernels,
    quantize,
)
from pidecode.engine.pixel_tiles import PixelHalves
from pidecode.engine.plan import Plan, predict, step_flops
from pidecode.engine.sequence_parallel import denoise_sharded, is_parallel
from pidecode.engine.tiling import Windows, denoise_windows
from pidecode.engine.timesteps import (
    StepModulation,
    TimestepCache,
    is_stripped,
    precompute,
    step_modulation,
    strip_for_inference,
)
from pidecode.errors import DoesNotFitError, SettingError
from pidecode.models.attention import (
    PACKAGES,
    AttentionKernel,
    MeasuredAttention,
    exact_kernels,
    kernel_works,
    record_path,
    tolerance,
    use_kernel,
)
from pidecode.models.pid.network import Condition, Grid, PiDNet
from pidecode.models.tiny import TinyDecoder
from pidecode.options import RuntimeOptions
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.registry.configs import PiDConfig
from pidecode.sampling import SINGLE_STEP_TIME, TIMESCALE, Predict
from pidecode.units import format_bytes

KEPT_TOKENS = 256_000_000  # bytes of latent tokens beyond which, without a plan, they are recomputed at each use
FREE_SHARE = 0.9  # part of a device's free memory that an image is planned to take; the rest is the allocator's slack


class Runner:
    """Runs a network the way a plan says; without one, whole, in the weights' own type, everything on its device.

    Args:
        net: The network.
        plan: How to run it; `arrange` brings the network into its shape.
        distilled: The network only ever runs at the student's times, so its modulation is precomputed for them.
        compile: Run the elementwise ops as fused kernels, compiled once for all image sizes. Experimental.
        cuda_graphs: Capture an evaluation as a CUDA graph, once per image size, and replay it; None where that can
            act and no plan limits the memory. Experimental.
        attention: "auto" (on accelerators the fastest, as measured there), a kernel of `exact_kernels`, or "int8".

    What `compile` and `cuda_graphs` run is compared with the plain ops on a small image first; where it fails or
    differs, a warning says so and the plain ops run.
    """

    def __init__(
        self,
        net: PiDNet,
        plan: Plan | None = None,
        *,
        distilled: bool = False,
        compile: bool = False,
        cuda_graphs: bool | None = False,
        attention: str = "auto",
    ) -> None:
        self.net, self.plan, self.distilled = net, plan, distilled
        self.cuda_graphs, self.attention = cuda_graphs, attention
        self.compiled_ops = CompiledOps() if compile else None
        self.graph_cache: GraphCache | None = None  # captured evaluations, from the first one on
        # Chunk sizes of the in-place forward; None for the largest that fit the device's free memory.
        self.chunks: Chunks | None = None if plan is None else plan.chunks
        self._image_chunks: Chunks | None = None
        self._halves = PixelHalves()
        self.offloader: BlockOffloader | None = None  # holds the patch blocks where the plan keeps them on the host
        self._timesteps: TimestepCache | None = None
        self._kernels: dict[tuple[str, str], AttentionKernel | None] = {}  # by name of the choice and type of device
        self.sequence_parallel = False  # whether the job's processes share each image; all then decode the same one
        self._finite = False  # whether the attention's first output was seen to be finite
        self._compared = False  # whether fused ops and graphs were compared with the plain ones

    def arrange(self, device: torch.device) -> None:
        """Strip, quantize and move the network as the plan says; it can no longer be saved or trained.

        Raises:
            SettingError: The device has no eight-bit matrix products of the plan's format.
        """
        self._strip()
        if self.plan is not None and self.plan.quantization != "none":
            self._quantize(self.plan, device)
        if self.offloads("blocks"):
            self.offloader = BlockOffloader(self.net.patch_blocks, device)
        self.place(device)

    def place(self, device: torch.device) -> None:
        """Move the network, and what was computed of it, to a device; offloaded blocks stay on the host."""
        for name, child in self.net.named_children():
            if self.offloader is None or name != "patch_blocks":
                child.to(device)
        if self.net.config.has_text:
            self.net.y_pos_embedding.data = self.net.y_pos_embedding.data.to(device)
        self._timesteps = None if self._timesteps is None else self._timesteps.to(device)
        self._drop_copies()

    def _drop_copies(self) -> None:
        self._halves.clear()
        if self.graph_cache is not None:
            self.graph_cache.clear()

    def require(self, device: torch.device) -> None:
        """Check that what was asked for can run on the device.

        Raises:
            MissingDependencyError: There is no compiler.
            SettingError: CUDA graphs cannot be captured here, or there is no such attention.
        """
        if self.compiled_ops is not None:
            require_compiler(device)
        if self.cuda_graphs and (conflict := self._graph_conflict(device)):
            raise SettingError(f"CUDA graphs {conflict}; leave them out.")
        self.attention_kernel(device)

    @property
    def changes_image(self) -> str | None:
        """The attention, where it changes an image by more than rounding."""
        return self.attention if self.attention == "int8" else None

    @property
    def attention_in_use(self) -> str:
        """The kernels that attention ran on so far, for reports."""
        kernel = self._kernels.get((self.attention, str(self.net.device)))
        measured = [kernel.eight_bit, kernel.exact] if isinstance(kernel, EightBitAttention) else [kernel]
        names = [name for one in measured if isinstance(one, MeasuredAttention) for name in one.chosen.values()]
        return ", ".join(dict.fromkeys(names)) or ("torch's choice" if self.attention == "auto" else self.attention)

    def _graph_conflict(self, device: torch.device) -> str | None:
        """Why no CUDA graphs can be captured, as the end of a sentence."""
        if not supports_cuda_graphs(device):
            return f"need a CUDA device, and this decoder runs on {device}"
        for conflict, what in (
            (self.sequence_parallel and is_parallel(), "an image sharded over several processes"),
            (self.plan is not None and self.plan.window is not None, "windows, which a plan chose to save memory"),
            (self.offloads("blocks"), "offloaded blocks, which stay on the host"),
            (inplace.has_adapters(self.net), "adapters, which keep the layers' own forward"),
        ):
            if conflict:
                return f"do not work with {what}"
        return None

    def _uses_graphs(self) -> bool:
        if self.cuda_graphs is None:
            return self.plan is None and self._graph_conflict(self.net.device) is None
        return self.cuda_graphs

    def attention_kernel(self, device: torch.device) -> AttentionKernel | None:
        """The kernel chosen, None where torch picks one, as on CPUs. Raises SettingError for one that does not work."""
        key = self.attention, str(device)
        if key not in self._kernels:
            self._kernels[key] = self._make_kernel(device)
        return self._kernels[key]

    def _make_kernel(self, device: torch.device) -> AttentionKernel | None:
        name, exact = self.attention, exact_kernels()
        if name == "auto":
            return None if device.type in ("cpu", "meta") else MeasuredAttention(exact, record=record_path())
        config, dtype = self.net.config, self.net.dtype
        heads = {config.hidden_size // config.num_heads, config.pixel_attn_hidden_size // config.pixel_num_heads}
        limit = EIGHT_BIT_TOLERANCE if name == "int8" else tolerance(dtype)
        if name == "int8":
            heads, candidates = heads & set(EIGHT_BIT_HEADS), {} if device.type == "cpu" else int8_kernels()
            if not heads:
                raise SettingError(f"Attention in int8 acts on heads of {EIGHT_BIT_HEADS} channels; this has none.")
        elif name in exact:
            candidates = {name: exact[name]}
        else:
            need = f" without the package {PACKAGES[name].split('.')[0]}" if name in PACKAGES else ""
            raise SettingError(f"There is no attention {name!r} here{need}; there are auto, {', '.join(exact)}, int8.")
        if device.type == "meta":
            return None
        works = {
            key: kernel for key, kernel in candidates.items()
            if all(kernel_works(kernel, head, dtype, device, limit) for head in heads)
        }  # fmt: skip
        if not works:
            need = "; it needs a GPU, and triton or sageattention installed" if name == "int8" else ""
            raise SettingError(f"Attention {name!r} does not work on {device} in {dtype}{need}. Use another, or auto.")
        if name != "int8":
            return works[name]
        return EightBitAttention(
            MeasuredAttention(works, tolerance=limit, record=record_path()),
            MeasuredAttention(exact, record=record_path()),
        )

    def _quantize(self, plan: Plan, device: torch.device) -> None:
        assert plan.quantization != "none"
        kernel = None if plan.scheme == "w8a16" else best_kernel(plan.quantization, self.net.dtype, device)
        if kernel is not None and device.type == "cpu":
            warnings.warn(
                "w8a8 is slower than float32 on a CPU without units for eight-bit products; compare with "
                "benchmarks/decode.py.",
                stacklevel=4,
            )
        for blocks in (self.net.patch_blocks, self.net.pixel_blocks):
            quantize(blocks, plan.quantization, kernel)

    def prepare(
        self, grid: Grid, text: Tensor | None, latent: Tensor | None = None, sigma: Tensor | None = None
    ) -> Condition:
        """What all steps of one image share; text-to-image networks take no latent."""
        if latent is None or sigma is None:
            return self.net.prepare(grid, text)
        keep = self._keeps_tokens(len(latent) * grid[0] * grid[1])
        patch = self.net.config.patch_size
        self._image_chunks = self._choose_chunks((grid[1] * patch, grid[0] * patch), len(latent))
        self.precompute_timesteps()
        if latent.device.type != "cpu":
            self._strip()  # the CPU's memory is not what runs short, and a whole network can still be changed
        if keep:
            return self.net.prepare(grid, text, latent, sigma)
        return prepare_recomputed(self.net, grid, text, latent, sigma)

    def denoise(self, x_B3HW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """One evaluation of the whole image, in place and in chunks where that is possible.

        Arguments and result are those of `PiDNet.denoise`. Times on the host are looked up in the timestep cache
        without synchronizing the device.

        Raises:
            SettingError: Gradients, autocast or adapters need the network's own forward, which a stripped or
                offloaded network no longer has.
        """
        if inplace.runs_in_place(self.net, x_B3HW.device):
            modulation = self.modulation_at(t_B)
            return self._evaluate(x_B3HW, modulation, condition)
        if self.offloader is not None or is_stripped(self.net):
            raise SettingError(
                "This network was brought into the form that only inference runs; decode under "
                "torch.inference_mode() and without autocast, or load it again without a memory plan."
            )
        return self.net.denoise(x_B3HW, t_B, condition)

    def modulation_at(self, t_B: Tensor) -> StepModulation:
        """What the network derives from the times `[B]` (multiplied by 1000) alone: cached, or evaluated."""
        cached = None if self._timesteps is None else self._timesteps.find(t_B)
        return cached or step_modulation(self.net, t_B)

    def plan_for(self, size: tuple[int, int], batch: int) -> Plan:
        """How width x height pixels are decoded here, with the memory that is predicted for it."""
        net, config = self.net, self.net.config
        if self.plan is not None:
            plan = replace(self.plan, size=size, batch=batch)
        else:
            plan = self._plan(size, batch, self._choose_chunks(size, batch))
        return predict(plan, config, accelerator=net.device.type != "cpu", stripped=is_stripped(net))

    def _plan(self, size: tuple[int, int], batch: int, chunks: Chunks) -> Plan:
        keep = self._keeps_tokens(batch * size[0] * size[1] // self.net.config.patch_size**2)
        dtype = str(self.net.dtype).removeprefix("torch.")
        return Plan(size=size, batch=batch, dtype=dtype, chunks=chunks, keep_tokens=keep)

    def _keeps_tokens(self, patches: int) -> bool:
        if self.plan is not None:
            return self.plan.keep_tokens
        config = self.net.config
        width = config.hidden_size * (3 if config.gate == "per_channel" else 1)
        return patches * width * config.num_injections * self.net.dtype.itemsize <= KEPT_TOKENS

    def precompute_timesteps(self) -> None:
        """Precompute the modulation of the distilled times, once."""
        if self.distilled and self._timesteps is None:
            self._timesteps = precompute(self.net, (SINGLE_STEP_TIME, *STUDENT_TIMES[:-1]))

    def forget(self) -> None:
        """Drop what is derived from the weights before they change. Raises SettingError if parts of them are gone."""
        if is_stripped(self.net) or (self.plan is not None and self.plan.quantization != "none"):
            raise SettingError(
                "The weights were already brought into the form that runs, so they cannot be changed any more. "
                "Load the decoder again, and change it before the first image and without a memory plan."
            )
        self._timesteps = None
        self._drop_copies()

    def _strip(self) -> None:
        if self.distilled and not is_stripped(self.net):
            self.precompute_timesteps()
            strip_for_inference(self.net)

    def offloads(self, what: str) -> bool:
        """Whether the plan has the "text" encoder, the image "encoder" or the "blocks" on the device only to run."""
        return self.plan is not None and what in self.plan.offload

    def predict(self, condition: Condition) -> Predict:
        """The network as a function of the noisy image and the time."""
        window, patch = self.plan.window if self.plan else None, self.net.config.patch_size
        windows = None if window is None else Windows.of_pixels(window, patch)
        self.require(self.net.device)
        self._compare_once()

        def once(x: Tensor, t: Tensor) -> Tensor:
            with use_kernel(self.attention_kernel(x.device)), self._ops():
                if self.sequence_parallel and is_parallel():
                    return denoise_sharded(self.net, self.denoise, x, t, condition)
                if windows is not None:
                    return denoise_windows(self.denoise, x, t, condition, windows, patch)
                if self._uses_graphs():
                    return self._replay(x, t, condition)
                return self.denoise(x, t, condition)

        def checked(x: Tensor, t: Tensor) -> Tensor:
            prediction = once(x, t)
            if self._finite or self.attention == "math" or self.attention_kernel(x.device) is None:
                return prediction
            self._finite = True
            if bool(torch.isfinite(prediction).all()) or not bool(torch.isfinite(x).all()):
                return prediction
            warnings.warn(
                f"Attention {self.attention!r} gave NaN on {x.device}; decoding goes on with the 'math' kernel, which "
                "is slower and takes more memory.",
                stacklevel=2,
            )
            self.attention = "math"
            return once(x, t)

        return checked

    def _compare_once(self) -> None:
        """Compare the fused ops, then a graph of one evaluation, with the plain ops on a small image, once.

        What fails or differs is left out, with a warning.
        """
        net, graphs = self.net, self._uses_graphs()
        if self._compared or not (graphs or self.compiled_ops) or not inplace.runs_in_place(net, net.device):
            return
        self._compared = True
        if net.device.type == "meta":
            return
        small = _SmallImage(net)
        with use_kernel(self.attention_kernel(net.device)):
            times = torch.full((1,), STUDENT_TIMES[1]) * TIMESCALE
            plain = [self.denoise(x, times, small.condition) for x in small.noise]
            if self.compiled_ops is not None:
                with self._ops():
                    why = small.fault(plain, lambda x: self.denoise(x, times, small.condition))
                if why is not None:
                    self._warn_of("Compiled ops", why)
                    self.compiled_ops = None
            if graphs:
                cache = GraphCache(self._evaluate, capture_on(net.device))
                with self._ops():
                    why = small.fault(
                        plain, lambda x: cache.run(x, self.modulation_at(times), small.condition, self.attention)
                    )
                if why is not None:
                    self._warn_of("CUDA graphs", why)
                    self.cuda_graphs = False

    def _warn_of(self, what: str, why: str) -> None:
        warnings.warn(
            f"{what} do not work on {self.net.device}: {why} Decoding goes on without them; the image is the same.",
            stacklevel=4,
        )

    def _ops(self) -> AbstractContextManager[None]:
        return nullcontext() if self.compiled_ops is None else elementwise.compiled_ops(self.compiled_ops)

    def _replay(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if not inplace.runs_in_place(self.net, x.device):
            raise SettingError(
                "CUDA graphs work without gradients and autocast only; decode under torch.inference_mode()."
            )
        if self.graph_cache is None:
            self.graph_cache = GraphCache(self._evaluate, capture_on(x.device))
        return self.graph_cache.run(x, self.modulation_at(t), condition, variant=self.attention)

    def _evaluate(self, x: Tensor, modulation: StepModulation, condition: Condition) -> Tensor:
        chunks = self.chunks or self._image_chunks or inplace.default_chunks(self.net, x.device)
        self._halves.keep = chunks.keep_modulation and not (self.plan and self.plan.quantization != "none")
        return inplace.denoise(
            self.net, x, modulation, condition, chunks=chunks, offloader=self.offloader, halves=self._halves
        )

    def _choose_chunks(self, size: tuple[int, int], batch: int) -> Chunks:
        """Those of the plan; else whole images where the device has the memory, else what suits it."""
        if self.chunks is not None:
            return self.chunks
        net, device = self.net, self.net.device
        free = None if device.type in ("cpu", "meta") else free_memory(device)
        whole = self._plan(size, batch, Chunks.whole(net.config.patch_size))
        if free is not None and predict(whole, net.config, stripped=is_stripped(net)).working <= FREE_SHARE * free:
            return whole.chunks
        return inplace.default_chunks(net, device)


class _SmallImage:
    """The smallest image of a network, with two noisy ones to evaluate."""

    def __init__(self, net: PiDNet) -> None:
        config, device, generator = net.config, net.device, torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        cell, patch = config.pixels_per_latent_cell, config.patch_size
        side = 2 * math.lcm(cell, patch)
        text = draw(1, config.text_length, config.text_dim) if config.has_text else None
        latent = draw(1, config.latent_channels, side // cell, side // cell)
        self.condition = net.prepare((side // patch, side // patch), text, latent, torch.zeros(1, device=device))
        self.noise = [draw(1, 3, side, side) for _ in range(2)]
        self.tolerance = 1e-3 if net.dtype == torch.float32 else 5e-2

    def fault(self, expected: list[Tensor], run: Callable[[Tensor], Tensor]) -> str | None:
        """Why a way to evaluate is not used, as a sentence; None if it gives what is expected, up to rounding."""
        try:
            found = [run(x) for x in self.noise]
        except Exception as error:  # compilers fail in many ways
            return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."
        apart = max(float((a - b).std() / b.std()) for a, b in zip(found, expected, strict=True))
        return None if apart <= self.tolerance else f"the result is {apart:.2g} off, relative to its spread."


def measured_step_seconds(plan: Plan, config: PiDConfig, device: torch.device) -> float:
    """Time that one denoising step of a plan takes now on the device.

    A network of the same widths and of one block of each kind is run on a small image, and its time scaled by the
    number of operations.
    """
    small = replace(config, patch_depth=1, pixel_depth=1)
    cells = max(MEASURED_SIDE // config.pixels_per_latent_cell, 1)
    side = cells * config.pixels_per_latent_cell
    with torch.device("meta"):
        net = PiDNet(small).to(getattr(torch, plan.dtype))
    with torch.device(device), torch.inference_mode():
        net = net.to_empty(device=device)
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(0.01)
        text = torch.zeros(1, small.text_length, small.text_dim) if small.has_text else None
        runner = Runner(net, replace(plan, size=(side, side), batch=1, window=None, offload=(), quantization="none"))
        latent = torch.zeros(1, small.latent_channels, cells, cells)
        condition = runner.prepare(net.grid_of(side, side), text, latent, torch.zeros(1))
        for _ in range(2):  # the first run also prepares kernels
            began = time.perf_counter()
            runner.denoise(torch.zeros(1, 3, side, side), torch.tensor([999.0]), condition).sum().item()
        seconds = time.perf_counter() - began
    return seconds * plan.batch * step_flops(config, plan.size) / step_flops(small, (side, side))


def make_runner(
    net: PiDNet | TinyDecoder, plan: Plan | FeedForwardPlan | None, runtime: RuntimeOptions, kind: str, name: str
) -> Runner | FeedForwardRunner:
    """The runner of a decoder of that kind and name. Raises SettingError for a plan or option of another kind."""
    if isinstance(net, TinyDecoder):
        if isinstance(plan, Plan) or runtime != RuntimeOptions():
            raise SettingError(
                f"{name} is a feed-forward decoder, which knows neither eight-bit weights, offloading, compile, "
                "cuda_graphs nor attention; leave them out."
            )
        return FeedForwardRunner(net, plan)
    if isinstance(plan, FeedForwardPlan):
        raise SettingError(f"{name} is a {kind} decoder; make its plan from its own configuration.")
    graphs = None if runtime.compile and runtime.cuda_graphs is None else bool(runtime.cuda_graphs)
    student, attention = kind == "student", runtime.attention
    return Runner(net, plan, distilled=student, compile=runtime.compile, cuda_graphs=graphs, attention=attention)


def require_memory(runner: Runner | FeedForwardRunner, size: tuple[int, int], batch: int) -> None:
    """Raises DoesNotFitError unless the device has the memory that images of that width and height need."""
    if isinstance(runner, Runner) and runner.sequence_parallel:
        return
    working, free = runner.plan_for(size, batch).working, free_memory(runner.net.device)
    if free is not None and working > free:
        raise DoesNotFitError(
            f"A result of {size[0]}x{size[1]} pixels needs about {format_bytes(working)} of memory, and "
            f"{format_bytes(free)} are free. Use a smaller input, or end other programs."
        )
