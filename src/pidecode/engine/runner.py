# SPDX-License-Identifier: Apache-2.0
"""Runs a PiDNet the way a plan says, and holds what that takes: caches, chunk sizes, offloaded blocks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pidecode.devices import free_memory, require_compiler, supports_cuda_graphs
from pidecode.engine import inplace, timesteps
from pidecode.engine.cuda_graphs import GraphCache, capture_on
from pidecode.engine.feed_forward import MEASURED_SIDE, FeedForwardPlan, FeedForwardRunner
from pidecode.engine.machine import Chunks
from pidecode.engine.offload import BlockOffloader
from pidecode.engine.ops import quantize
from pidecode.engine.ops.elementwise import CompiledOps, compiled_ops
from pidecode.engine.pixel_tiles import Halves
from pidecode.engine.plan import Plan, predict, step_flops
from pidecode.engine.sequence_parallel import denoise_sharded, is_parallel
from pidecode.engine.tiling import denoise_windows
from pidecode.errors import DoesNotFitError, SettingError
from pidecode.models import attention as kernels
from pidecode.models.attention import AttentionKernel, MeasuredAttention
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
        self._halves: Halves = {}  # the pixel blocks' weights cut to tiles, where the chunks say that they are kept
        self.offloader: BlockOffloader | None = None  # holds the patch blocks where the plan keeps them on the host
        self._timesteps: timesteps.TimestepCache | None = None
        self._kernels: dict[tuple[str, str], AttentionKernel | None] = {}  # by name of the choice and type of device
        self.sequence_parallel = False  # whether the job's processes share each image; all then decode the same one
        self._finite = False  # whether the attention's first output was looked at for NaN
        self._compared = False  # whether fused ops and graphs were compared with the plain ones

    def arrange(self, device: torch.device) -> None:
        """Strip, quantize and move the network as the plan says; it can no longer be saved or trained.

        Raises:
            SettingError: The device has no eight-bit matrix products of the plan's format.
        """
        self._strip()
        if self.plan is not None and self.plan.quantization != "none":
            format, eight_bit = self.plan.quantization, self.plan.scheme == "w8a8"
            if eight_bit:
                quantize.require_products(format, self.net.dtype, device)
                if device.type == "cpu":
                    warnings.warn(
                        "w8a8 is slower than float32 on a CPU without units for eight-bit products; compare with "
                        "benchmarks/decode.py.",
                        stacklevel=3,
                    )
            for blocks in (self.net.patch_blocks, self.net.pixel_blocks):
                quantize.quantize(blocks, format, eight_bit)
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
        self._halves.clear()
        self.graph_cache = None

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
        measured = [kernel.eight_bit, kernel.exact] if isinstance(kernel, quantize.EightBitAttention) else [kernel]
        names = [name for one in measured if isinstance(one, MeasuredAttention) for name in one.chosen.values()]
        return ", ".join(dict.fromkeys(names)) or ("torch's choice" if self.attention == "auto" else self.attention)

    def _graph_conflict(self, device: torch.device) -> str | None:
        """Why no CUDA graphs can be captured, as the end of a sentence."""
        conflicts = {
            f"need a CUDA device, and this decoder runs on {device}": not supports_cuda_graphs(device),
            "do not work with an image sharded over several processes": self.sequence_parallel and is_parallel(),
            "do not work with windows, which a plan chose to save memory": self.plan and self.plan.window,
            "do not work with offloaded blocks, which stay on the host": self.offloads("blocks"),
            "do not work with adapters, which keep the layers' own forward": inplace.has_adapters(self.net),
        }
        return next((text for text, holds in conflicts.items() if holds), None)

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
        name, exact = self.attention, kernels.exact_kernels()
        record = kernels.record_path()
        if name == "auto":
            return None if device.type in ("cpu", "meta") else MeasuredAttention(exact, record=record)
        config, dtype = self.net.config, self.net.dtype
        heads = {config.hidden_size // config.num_heads, config.pixel_attn_hidden_size // config.pixel_num_heads}
        candidates, limit = {name: exact[name]} if name in exact else {}, kernels.tolerance(dtype)
        if name == "int8":
            heads, limit = heads.intersection(quantize.EIGHT_BIT_HEADS), quantize.EIGHT_BIT_TOLERANCE
            candidates = {} if device.type == "cpu" else quantize.int8_kernels()
            if not heads:
                sizes = quantize.EIGHT_BIT_HEADS
                raise SettingError(f"Attention in int8 acts on heads of {sizes} channels; this has none.")
        elif not candidates:
            package = kernels.PACKAGES.get(name, "").split(".")[0]
            need = f" without the package {package}" if package else ""
            raise SettingError(f"There is no attention {name!r} here{need}; there are auto, {', '.join(exact)}, int8.")
        if device.type == "meta":
            return None
        works = {
            key: kernel for key, kernel in candidates.items()
            if all(kernels.kernel_works(kernel, head, dtype, device, limit) for head in heads)
        }  # fmt: skip
        if not works:
            need = "; it needs a GPU, and triton or sageattention installed" if name == "int8" else ""
            raise SettingError(f"Attention {name!r} does not work on {device} in {dtype}{need}. Use another, or auto.")
        if name != "int8":
            return works[name]
        eight_bit = MeasuredAttention(works, tolerance=limit, record=record)
        return quantize.EightBitAttention(eight_bit, MeasuredAttention(exact, record=record))

    def prepare(
        self, grid: Grid, text: Tensor | None, latent: Tensor | None = None, sigma: Tensor | None = None
    ) -> Condition:
        """What all steps of one image share; text-to-image networks take no latent."""
        if latent is None or sigma is None:
            return self.net.prepare(grid, text)
        patch = self.net.config.patch_size
        plan = self._image_plan((grid[1] * patch, grid[0] * patch), len(latent))
        self._image_chunks = plan.chunks
        self.precompute_timesteps()
        if latent.device.type != "cpu":
            self._strip()  # the CPU's memory is not what runs short, and a whole network can still be changed
        prepare = PiDNet.prepare if plan.keep_tokens else inplace.prepare_recomputed
        return prepare(self.net, grid, text, latent, sigma)

    def denoise(self, x_B3HW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """One evaluation of the whole image, in place and in chunks where that is possible.

        Arguments and result are those of `PiDNet.denoise`. Times on the host are looked up in the timestep cache
        without synchronizing the device.

        Raises:
            SettingError: Gradients, autocast or adapters need the network's own forward, which a stripped or
                offloaded network no longer has.
        """
        if inplace.runs_in_place(self.net, x_B3HW.device):
            return self._evaluate(x_B3HW, self.modulation_at(t_B), condition)
        if self.offloader is not None or timesteps.is_stripped(self.net):
            raise SettingError(
                "This network was brought into the form that only inference runs; decode under "
                "torch.inference_mode() and without autocast, or load it again without a memory plan."
            )
        return self.net.denoise(x_B3HW, t_B, condition)

    def modulation_at(self, t_B: Tensor) -> timesteps.StepModulation:
        """What the network derives from the times `[B]` (multiplied by 1000) alone: cached, or evaluated."""
        cached = None if self._timesteps is None else self._timesteps.find(t_B)
        return cached or timesteps.step_modulation(self.net, t_B)

    def plan_for(self, size: tuple[int, int], batch: int) -> Plan:
        """How width x height pixels are decoded here, with the memory that is predicted for it."""
        plan, net = self._image_plan(size, batch), self.net
        return predict(plan, net.config, accelerator=net.device.type != "cpu", stripped=timesteps.is_stripped(net))

    def _image_plan(self, size: tuple[int, int], batch: int) -> Plan:
        """As planned; without a plan, whole images where the device has the memory, else chunks that suit it."""
        net, config, device, plan = self.net, self.net.config, self.net.device, self.plan
        if plan is None:
            width = config.hidden_size * (3 if config.gate == "per_channel" else 1)
            tokens = batch * size[0] * size[1] // config.patch_size**2 * width * config.num_injections
            dtype = str(net.dtype).removeprefix("torch.")
            plan = Plan(size=size, dtype=dtype, keep_tokens=tokens * net.dtype.itemsize <= KEPT_TOKENS)
        plan = replace(plan, size=size, batch=batch, chunks=self.chunks or Chunks.whole(config.patch_size))
        if self.chunks is None:
            free = None if device.type in ("cpu", "meta") else free_memory(device)
            if free is None or predict(plan, config, stripped=timesteps.is_stripped(net)).working > FREE_SHARE * free:
                plan = replace(plan, chunks=inplace.default_chunks(net, device))
        return plan

    def precompute_timesteps(self) -> None:
        """Precompute the modulation of the distilled times, once."""
        if self.distilled and self._timesteps is None:
            self._timesteps = timesteps.precompute(self.net, (SINGLE_STEP_TIME, *STUDENT_TIMES[:-1]))

    def forget(self) -> None:
        """Drop what is derived from the weights before they change. Raises SettingError if parts of them are gone."""
        if timesteps.is_stripped(self.net) or (self.plan is not None and self.plan.quantization != "none"):
            raise SettingError(
                "The weights were already brought into the form that runs, so they cannot be changed any more. "
                "Load the decoder again, and change it before the first image and without a memory plan."
            )
        self._timesteps = self.graph_cache = None
        self._halves.clear()

    def _strip(self) -> None:
        if self.distilled and not timesteps.is_stripped(self.net):
            self.precompute_timesteps()
            timesteps.strip_for_inference(self.net)

    def offloads(self, what: str) -> bool:
        """Whether the plan has the "text" encoder, the image "encoder" or the "blocks" on the device only to run."""
        return self.plan is not None and what in self.plan.offload

    def predict(self, condition: Condition) -> Predict:
        """The network as a function of the noisy image and the time."""
        window = self.plan.window if self.plan else None
        self.require(self.net.device)
        self._compare_once()

        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            with kernels.use_kernel(self.attention_kernel(x.device)), compiled_ops(self.compiled_ops):
                if self.sequence_parallel and is_parallel():
                    return denoise_sharded(self.net, self.denoise, x, t, condition)
                if window is not None:  # a quarter of each is shared with its neighbor
                    side = max(1, window // self.net.config.patch_size)
                    return denoise_windows(self.denoise, x, t, condition, side, side // 4)
                if self._uses_graphs():
                    return self._replay(x, t, condition)
                return self.denoise(x, t, condition)

        def checked(x: Tensor, t: Tensor) -> Tensor:
            prediction = evaluate(x, t)
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
            return evaluate(x, t)

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
        condition, noise = _small_image(net)
        times = torch.full((1,), STUDENT_TIMES[1]) * TIMESCALE
        with kernels.use_kernel(self.attention_kernel(net.device)):
            expected = [self.denoise(x, times, condition) for x in noise]

            def agrees(what: str, run: Callable[[Tensor], Tensor]) -> bool:
                try:
                    with compiled_ops(self.compiled_ops):
                        found = [run(x) for x in noise]
                except Exception as error:  # compilers fail in many ways
                    why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                else:
                    apart = max(float((a - b).std() / b.std()) for a, b in zip(found, expected, strict=True))
                    if apart <= (1e-3 if net.dtype == torch.float32 else 5e-2):
                        return True
                    why = f"the result is {apart:.2g} off, relative to its spread"
                warnings.warn(
                    f"{what} do not work on {net.device}: {why}. Decoding goes on without them; the image is the same.",
                    stacklevel=4,
                )
                return False

            if self.compiled_ops and not agrees("Compiled ops", lambda x: self.denoise(x, times, condition)):
                self.compiled_ops = None
            cache, modulation = GraphCache(self._evaluate, capture_on(net.device)), self.modulation_at(times)
            if graphs and not agrees("CUDA graphs", lambda x: cache.run(x, modulation, condition, self.attention)):
                self.cuda_graphs = False

    def _replay(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if not inplace.runs_in_place(self.net, x.device):
            raise SettingError(
                "CUDA graphs work without gradients and autocast only; decode under torch.inference_mode()."
            )
        if self.graph_cache is None:
            self.graph_cache = GraphCache(self._evaluate, capture_on(x.device))
        return self.graph_cache.run(x, self.modulation_at(t), condition, variant=self.attention)

    def _evaluate(self, x: Tensor, modulation: timesteps.StepModulation, condition: Condition) -> Tensor:
        chunks = self.chunks or self._image_chunks or inplace.default_chunks(self.net, x.device)
        keep = chunks.keep_modulation and not (self.plan and self.plan.quantization != "none")
        halves = self._halves if keep else None
        return inplace.denoise(
            self.net, x, modulation, condition, chunks=chunks, offloader=self.offloader, halves=halves
        )


def _small_image(net: PiDNet) -> tuple[Condition, list[Tensor]]:
    """The condition of a network's smallest image, and two noisy ones to evaluate."""
    config, device, generator = net.config, net.device, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    cell, patch = config.pixels_per_latent_cell, config.patch_size
    side = 2 * math.lcm(cell, patch)
    text = draw(1, config.text_length, config.text_dim) if config.has_text else None
    latent = draw(1, config.latent_channels, side // cell, side // cell)
    condition = net.prepare((side // patch, side // patch), text, latent, torch.zeros(1, device=device))
    return condition, [draw(1, 3, side, side) for _ in range(2)]


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
