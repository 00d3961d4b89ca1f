# SPDX-License-Identifier: Apache-2.0
"""A network at work under a plan: arranged once, then asked for predictions step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pidecode.devices import records_graphs, require_compiler
from pidecode.engine.cuda_graphs import GraphCache, cuda_graph
from pidecode.engine.inplace import denoise
from pidecode.engine.offload import BlockOffloader
from pidecode.engine.ops import elementwise as lean
from pidecode.engine.ops.compiled import CompiledOps
from pidecode.engine.ops.quantize import best_way, quantize
from pidecode.engine.plan import Plan, predict
from pidecode.engine.sequence_parallel import denoise_together, is_spread
from pidecode.engine.tiling import Windows, denoise_windows
from pidecode.engine.timesteps import TimestepCache, depends_on_noise, precompute, strip_for_inference
from pidecode.errors import SettingError
from pidecode.models.attention import best_backend, use
from pidecode.models.pid.network import Condition, Grid, PiDNet
from pidecode.models.regressor import look_through
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.sampling import SINGLE_STEP_TIME

Predict = Callable[[Tensor, Tensor], Tensor]


KEPT_TOKENS = 256_000_000
"""Without a plan, latent tokens beyond this many bytes are made anew at each use: a hundredth more work."""


class Runner:
    """Runs a network the way a plan says; without one, whole, in the weights' own type, everything on its device.

    fused: run the sums around the matrix products as Triton kernels.
    compile: run them as the framework compiles them, once for all image sizes.
    graphs: record an evaluation once per image size and replay it at each step; CUDA devices only.
    distilled: the network only ever runs at the student's times, so what depends on time alone is tabulated.
    """

    def __init__(
        self,
        net: PiDNet,
        plan: Plan | None = None,
        *,
        distilled: bool = False,
        fused: bool = False,
        compile: bool = False,
        graphs: bool = False,
    ) -> None:
        if fused and compile:
            raise SettingError("fused and compile are two ways to run the same sums; choose one.")
        self.net, self.plan, self.distilled, self.fused = net, plan, distilled, fused
        self.graphs = graphs
        self.look = look_through(net)
        """The short way from latent to image, which an encoder also looks through; None where there is none."""
        self.sums = CompiledOps() if compile else None
        """The compiled sums, if any."""
        self.recordings: GraphCache | None = None
        """Recorded evaluations, from the first one on."""
        self._schedule: TimestepCache | None = None
        self._depends_on_noise: bool | None = None
        self.backend: str | None = None
        """Attention kernel in use; None where the framework picks one per call, as on processors."""
        self.spread = False
        """Whether the processes of this job share each image; all of them must then ask for the same one."""
        self._checked = False

    def arrange(self, device: torch.device) -> None:
        """Bring the network into the plan's shape, on `device`, for good: it can no longer be saved or trained.

        A distilled network forgets what made its table of times; weights are quantized; blocks go to the host.
        Raises SettingError where the device does not multiply as the plan says.
        """
        plan = self.plan
        self._strip()
        if plan is not None:
            self.net.chunks = plan.chunks
            if plan.weights != "plain":
                self._quantize(plan, device)
            if "blocks" in plan.offload:
                self.net.offloader = BlockOffloader(self.net.patch_blocks, device)
        for name, child in self.net.named_children():
            if self.net.offloader is None or name != "patch_blocks":
                child.to(device)
        if self.net.config.has_text:
            self.net.y_pos_embedding.data = self.net.y_pos_embedding.data.to(device)

    def require(self, device: torch.device) -> None:
        """Raise an error that says the mend, if what was asked for cannot run on the device.

        MissingDependencyError for a compiler that is not there, SettingError for graphs where they cannot be.
        """
        if self.sums is not None:
            require_compiler(device)
        if not self.graphs:
            return
        plan = self.plan
        if not records_graphs(device):
            raise SettingError(f"graphs need a CUDA device, and this decoder runs on {device}; leave graphs out.")
        for hinders, what in (
            (self.spread and is_spread(), "an image spread over several processes"),
            (plan is not None and plan.window is not None, "windows, which a plan chose to save memory"),
            (plan is not None and "blocks" in plan.offload, "blocks that live on the host"),
            (self.net.plain, "adapters that keep the layers' own forward"),
        ):
            if hinders:
                raise SettingError(f"graphs do not go together with {what}; leave graphs out.")

    def _quantize(self, plan: Plan, device: torch.device) -> None:
        assert plan.weights != "plain"
        way = best_way(plan.weights, self.net.dtype, device) if plan.products == "eight" else None
        if way is not None and device.type == "cpu":
            warnings.warn(
                "Products in eight bits are slower than float32 on a processor without units for them; compare with "
                "`pidecode bench`.",
                stacklevel=4,
            )
        for blocks in (self.net.patch_blocks, self.net.pixel_blocks):
            quantize(blocks, plan.weights, way)

    def prepare(self, grid: Grid, text: Tensor | None, latent: Tensor, sigma: Tensor) -> Condition:
        """What all steps of one image share."""
        keep = self._keeps_tokens(len(latent) * grid[0] * grid[1])
        if latent.device.type != "cpu":
            self._strip()  # a processor's memory is not what runs short, and a whole network can still be changed
        return self.net.prepare(grid, text, latent, sigma, keep_tokens=keep, schedule=self.schedule())

    def plan_for(self, size: tuple[int, int], batch: int) -> Plan:
        """How width x height pixels are decoded here, with the memory that is predicted for it."""
        net, config = self.net, self.net.config
        if self.plan is not None:
            plan = replace(self.plan, size=size, batch=batch)
        else:
            plan = Plan(
                size=size,
                batch=batch,
                dtype=str(net.dtype).removeprefix("torch."),
                chunks=net.chunks_for(net.device),
                keep_tokens=self._keeps_tokens(batch * size[0] * size[1] // config.patch_size**2),
            )
        return predict(plan, config, accelerator=net.device.type != "cpu", stripped=net.stripped)

    def _keeps_tokens(self, patches: int) -> bool:
        if self.plan is not None:
            return self.plan.keep_tokens
        config = self.net.config
        width = config.hidden_size * (3 if config.gate == "per_channel" else 1)
        return patches * width * config.num_injections * self.net.dtype.itemsize <= KEPT_TOKENS

    def schedule(self) -> TimestepCache | None:
        """The table of the distilled times, made when first asked for."""
        if self.distilled and self._schedule is None:
            self._schedule = precompute(self.net, (SINGLE_STEP_TIME, *STUDENT_TIMES[:-1]))
        return self._schedule

    def forget(self) -> None:
        """Call before the weights change. Raises SettingError if parts of them are gone already."""
        if self.net.stripped or (self.plan is not None and self.plan.weights != "plain"):
            raise SettingError(
                "The weights were already brought into the form that runs, so they cannot be changed any more. "
                "Load the decoder again, and change it before the first image and without a memory plan."
            )
        self._schedule = self._depends_on_noise = self.look = None
        if self.recordings is not None:
            self.recordings.clear()

    def _strip(self) -> None:
        if self.schedule() is not None and not self.net.stripped:
            self.depends_on_noise()
            strip_for_inference(self.net)

    def depends_on_noise(self) -> bool:
        """Whether the network's answer can differ from step to step; looked up in its weights once."""
        if self._depends_on_noise is None:
            self._depends_on_noise = depends_on_noise(self.net)
        return self._depends_on_noise

    def sets_aside(self, what: str) -> bool:
        """Whether the plan has "text" or "encoder" leave the device when their work is done."""
        return self.plan is not None and what in self.plan.offload

    def predict(self, condition: Condition) -> Predict:
        """The network as a function of the noisy image and the time.

        It is asked once if it heeds neither, and not at all where the short way says the same.
        """
        windows = None
        if self.plan is not None and self.plan.window is not None:
            windows = Windows.of_pixels(self.plan.window, self.net.config.patch_size)

        self.require(self.net.device)
        shortly = self._answers_shortly(condition)
        if shortly is not None:
            return _asked_once(shortly)

        def once(x: Tensor, t: Tensor) -> Tensor:
            with use(self.backend), self._sums():
                if self.spread and is_spread():
                    return denoise_together(self.net, x, t, condition)
                if windows is not None:
                    return denoise_windows(self.net, x, t, condition, windows)
                if self.graphs:
                    return self._replay(x, t, condition)
                return self.net.denoise(x, t, condition)

        def checked(x: Tensor, t: Tensor) -> Tensor:
            self._choose_backend(x.device)
            prediction = once(x, t)
            if self._checked or self.backend in (None, "math"):
                return prediction
            self._checked = True
            if bool(torch.isfinite(prediction).all()) or not bool(torch.isfinite(x).all()):
                return prediction
            warnings.warn(
                f"Attention through {self.backend!r} answered NaN on {x.device}; decoding goes on with the plain "
                "kernel, which is slower and takes more memory.",
                stacklevel=2,
            )
            self.backend = "math"
            return once(x, t)

        return checked if self.depends_on_noise() else _asked_once(checked)

    def _answers_shortly(self, condition: Condition) -> Predict | None:
        """The short way, where the network has one and nothing asks for the long one to be run in some manner."""
        look, plan, tokens = self.look, self.plan, condition.pixel_injection
        if look is None or tokens is None or self.graphs or self.fused or self.sums is not None or self.spread:
            return None
        if plan is not None and (plan.window is not None or plan.weights != "plain"):
            return None
        return lambda x, t: look.image(tokens.tokens, condition.grid)

    def _sums(self) -> AbstractContextManager[None]:
        if self.sums is not None:
            return lean.compiled(self.sums)
        return lean.fused() if self.fused else nullcontext()

    def _replay(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if not self.net.runs_lean(x.device):
            raise SettingError("graphs work without gradients and autocast only; decode under torch.inference_mode().")
        if self.recordings is None:
            self.recordings = GraphCache(partial(denoise, self.net), cuda_graph(x.device))
        return self.recordings.run(x, self.net.modulation_at(t, condition), condition, variant=self.backend)

    def _choose_backend(self, device: torch.device) -> None:
        if self.backend is not None or device.type in ("cpu", "meta"):
            return
        config = self.net.config
        head_dims = (config.hidden_size // config.num_heads, config.pixel_attn_hidden_size // config.pixel_num_heads)
        self.backend = best_backend(head_dims, self.net.dtype, device)


def _asked_once(predict: Predict) -> Predict:
    """`predict` for a network that answers the same at every step: all later steps get the first one's answer."""
    answers: list[Tensor] = []

    def remembered(x: Tensor, t: Tensor) -> Tensor:
        if not answers:
            answers.append(predict(x, t))
        return answers[0]

    return remembered
