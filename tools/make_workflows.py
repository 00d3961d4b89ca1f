# SPDX-License-Identifier: Apache-2.0
"""Rewrite comfyui/example_workflows: one workflow per family, laid out in columns so that no node hides another.

Run as `python tools/make_workflows.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pidecode.options import Command, option_infos

FOLDER = Path(__file__).resolve().parent.parent / "comfyui" / "example_workflows"
Slot = tuple[int, int]  # node, and index of its output

NODES: dict[str, tuple[str, str]] = {
    "BasicGuider": ("model conditioning", "GUIDER"),
    "BasicScheduler": ("model", "SIGMAS"),
    "CFGGuider": ("model positive:CONDITIONING negative:CONDITIONING", "GUIDER"),
    "CheckpointLoaderSimple": ("", "MODEL CLIP VAE"),
    "CLIPLoader": ("", "CLIP"),
    "CLIPTextEncode": ("clip", "CONDITIONING"),
    "DualCLIPLoader": ("", "CLIP"),
    "EmptyFlux2LatentImage": ("", "LATENT"),
    "EmptyLatentImage": ("", "LATENT"),
    "EmptySD3LatentImage": ("", "LATENT"),
    "Flux2Scheduler": ("", "SIGMAS"),
    "FluxGuidance": ("conditioning", "CONDITIONING"),
    "KSampler": ("model positive:CONDITIONING negative:CONDITIONING latent_image:LATENT", "LATENT"),
    "KSamplerSelect": ("", "SAMPLER"),
    "LoadImage": ("", "IMAGE MASK"),
    "ModelSamplingAuraFlow": ("model", "MODEL"),
    "PidecodeConditioning": (
        "decoder:PIDECODE_DECODER samples:LATENT positive:CONDITIONING negative:CONDITIONING model",
        "positive:CONDITIONING negative:CONDITIONING image:LATENT sigmas",
    ),
    "PidecodeDecode": (
        "decoder:PIDECODE_DECODER samples:LATENT latent_sigma:FLOAT model vae conditioning", "IMAGE",
    ),
    "PidecodeEarlyStop": (
        "sigmas model decoder:PIDECODE_DECODER samples:LATENT", "sigmas latent_sigma:FLOAT",
    ),
    "PidecodeLoadDecoder": ("", "decoder:PIDECODE_DECODER model"),
    "PidecodeUpscale": ("decoder:PIDECODE_DECODER image vae mask conditioning", "IMAGE MASK"),
    "RandomNoise": ("", "NOISE"),
    "SamplerCustomAdvanced": (
        "noise guider sampler sigmas latent_image:LATENT", "output:LATENT denoised_output:LATENT",
    ),
    "SaveImage": ("images:IMAGE", ""),
    "UNETLoader": ("", "MODEL"),
    "VAEDecode": ("samples:LATENT vae", "IMAGE"),
    "VAELoader": ("", "VAE"),
}  # fmt: skip
"""Sockets of each kind of node: `name:TYPE`, or a name that is its type in small letters."""

DECODER = ["auto", "", "as the file says", "as the file says", "none", 1.0]
"""Widgets of the loader after its model."""
PROMPT = "a lighthouse on a cliff at dawn, photograph"

WIDTH, GAP, TITLE, ROW, TEXT_ROWS = 340, 60, 34, 26, 5


def option_widgets(command: Command) -> list[Any]:
    """Values of a node's decode options that leave each to the decoder, and of `memory`."""
    values: list[Any] = []
    for name, info in option_infos(command=command, interface="comfyui").items():
        if name == "seed":
            values += [0, "fixed"]
        elif info.choices:
            values.append("default")
        elif info.type is str:
            values.append("")
        else:
            values.append(-1 if info.minimum == 0 and (info.type is int or name == "fidelity") else 0)
    return [*values, "default"]


class Workflow:
    """Nodes in columns, from left to right in the order in which they run."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.bottom: dict[int, int] = {}

    def add(self, column: int, kind: str, widgets: list[Any] | None = None, **links: Slot) -> int:
        """Put a node below the others of its column; returns its number."""
        widgets, number = widgets or [], len(self.nodes) + 1
        sockets, outputs = (_sockets(text) for text in NODES[kind])
        rows = max(len(sockets), len(outputs)) + len(widgets) + TEXT_ROWS * (kind in WITH_TEXT)
        rows += 10 * (kind in ("LoadImage", "SaveImage"))
        top, height = self.bottom.get(column, 60), TITLE + ROW * rows
        self.bottom[column] = top + height + TITLE + GAP
        node: dict[str, Any] = {
            "id": number, "type": kind, "pos": [40 + column * (WIDTH + GAP), top], "size": [WIDTH, height], "flags": {},
            "order": number - 1, "mode": 0, "inputs": [], "outputs": [], "properties": {"Node name for S&R": kind},
            "widgets_values": widgets,
        }  # fmt: skip
        for place, (name, type_) in enumerate(sockets):
            link = None
            if name in links:
                link = len(self.links) + 1
                source, slot = links.pop(name)
                self.links.append([link, source, slot, number, place, type_])
                self.nodes[source - 1]["outputs"][slot]["links"].append(link)
            entry = {"name": name, "type": type_, "link": link}
            node["inputs"].append(entry | ({"widget": {"name": name}} if type_ == "FLOAT" else {}))
        node["outputs"] = [{"name": name, "type": type_, "links": []} for name, type_ in outputs]
        if links:
            raise KeyError(f"{kind} has no {', '.join(links)}.")
        self.nodes.append(node)
        return number

    def write(self, name: str) -> None:
        """Write `name`.json."""
        last = {"last_node_id": len(self.nodes), "last_link_id": len(self.links)}
        content = last | {"nodes": self.nodes, "links": self.links, "groups": [], "config": {}, "extra": {}}
        (FOLDER / f"{name}.json").write_text(json.dumps(content | {"version": 0.4}, indent=1) + "\n", encoding="utf-8")


WITH_TEXT = ("CLIPTextEncode", "PidecodeDecode", "PidecodeUpscale", "PidecodeConditioning")


def _sockets(text: str) -> list[tuple[str, str]]:
    return [(name, type_ or name.upper()) for name, _, type_ in (entry.partition(":") for entry in text.split())]


def upscale() -> Workflow:
    """An image four times as large; needs nothing but what ships."""
    flow = Workflow()
    image = flow.add(0, "LoadImage", ["example.png", "image"])
    decoder = flow.add(0, "PidecodeLoadDecoder", ["tiny", *DECODER])
    large = flow.add(
        1,
        "PidecodeUpscale",
        [*option_widgets("upscale"), 0, 0],
        decoder=(decoder, 0),
        image=(image, 0),
        mask=(image, 1),
    )
    flow.add(2, "SaveImage", ["pidecode"], images=(large, 0))
    return flow


def _decode(flow: Workflow, column: int, decoder: int, samples: Slot, model: Slot, sigma: Slot | None) -> None:
    noisy = {"latent_sigma": sigma} if sigma else {}
    image = flow.add(
        column, "PidecodeDecode", [*option_widgets("decode"), 0.0], decoder=(decoder, 0), samples=samples,
        model=model, **noisy,
    )  # fmt: skip
    flow.add(column + 1, "SaveImage", ["pidecode"], images=(image, 0))


def early_stop(
    space: str, loaders: list[tuple[str, list[Any]]], steps: int, size: tuple[int, int], *,
    scheduler: str = "simple", guidance: float | None = None, cfg: float | None = None,
    shift: float | None = None,
) -> Workflow:  # fmt: skip
    """Text to latent, stopped early where that is recommended, and the latent to an image."""
    flow = Workflow()
    loaded = [flow.add(0, kind, widgets) for kind, widgets in loaders]
    checkpoint = loaders[0][0] == "CheckpointLoaderSimple"
    model, clip = (loaded[0], 0), (loaded[0], 1) if checkpoint else (loaded[1], 0)
    decoder = flow.add(0, "PidecodeLoadDecoder", [space, *DECODER])
    if shift is not None:
        model = (flow.add(1, "ModelSamplingAuraFlow", [shift], model=model), 0)
    positive = (flow.add(1, "CLIPTextEncode", [PROMPT], clip=clip), 0)
    if guidance is not None:
        positive = (flow.add(1, "FluxGuidance", [guidance], conditioning=positive), 0)
    if cfg is None:
        guider = flow.add(2, "BasicGuider", model=model, conditioning=positive)
    else:
        negative = flow.add(1, "CLIPTextEncode", [""], clip=clip)
        guider = flow.add(2, "CFGGuider", [cfg], model=model, positive=positive, negative=(negative, 0))
    noise = flow.add(2, "RandomNoise", [0, "fixed"])
    chosen = flow.add(2, "KSamplerSelect", ["euler"])
    if space.startswith("flux2"):
        sigmas = flow.add(2, "Flux2Scheduler", [steps, *size])
    else:
        sigmas = flow.add(2, "BasicScheduler", [scheduler, steps, 1.0], model=model)
    empty = {"flux2": "EmptyFlux2LatentImage", "sdxl": "EmptyLatentImage"}.get(
        space.partition("/")[0], "EmptySD3LatentImage"
    )
    latent = flow.add(2, empty, [*size, 1])
    stop = flow.add(
        3, "PidecodeEarlyStop", [-1], sigmas=(sigmas, 0), model=model, decoder=(decoder, 0), samples=(latent, 0)
    )  # fmt: skip
    sampled = flow.add(
        3, "SamplerCustomAdvanced", noise=(noise, 0), guider=(guider, 0), sampler=(chosen, 0), sigmas=(stop, 0),
        latent_image=(latent, 0),
    )  # fmt: skip
    _decode(flow, 4, decoder, (sampled, 0), model, (stop, 1))
    return flow


def _sampled(flow: Workflow) -> tuple[int, Slot, Slot]:
    """Z-Image's nodes up to a finished latent: its decoder's loader, its MODEL, the LATENT."""
    unet = flow.add(0, "UNETLoader", ["z_image_turbo_bf16.safetensors", "default"])
    clip = flow.add(0, "CLIPLoader", ["qwen_3_4b.safetensors", "lumina2", "default"])
    decoder = flow.add(0, "PidecodeLoadDecoder", ["flux/2kto4k_v1pt5", *DECODER])
    model = (flow.add(1, "ModelSamplingAuraFlow", [3.0], model=(unet, 0)), 0)
    positive = flow.add(1, "CLIPTextEncode", [PROMPT], clip=(clip, 0))
    negative = flow.add(1, "CLIPTextEncode", [""], clip=(clip, 0))
    latent = flow.add(1, "EmptySD3LatentImage", [1024, 1024, 1])
    sampled = flow.add(
        2, "KSampler", [0, "fixed", 9, 1.0, "res_multistep", "simple", 1.0], model=model, positive=(positive, 0),
        negative=(negative, 0), latent_image=(latent, 0),
    )  # fmt: skip
    return decoder, model, (sampled, 0)


def z_image() -> Workflow:
    """A model of few steps, which runs to its end."""
    flow = Workflow()
    decoder, model, samples = _sampled(flow)
    _decode(flow, 3, decoder, samples, model, None)
    return flow


def core_samplers() -> Workflow:
    """The decoder as an ordinary MODEL, which ComfyUI's KSampler runs."""
    flow = Workflow()
    decoder, model, samples = _sampled(flow)
    gemma = flow.add(2, "CLIPLoader", ["gemma_2_2b_it_elm_bf16.safetensors", "pixeldit", "default"])
    prompt = flow.add(2, "CLIPTextEncode", [PROMPT], clip=(gemma, 0))
    condition = flow.add(
        3, "PidecodeConditioning", ["", 0, 0.0], decoder=(decoder, 0), samples=samples, positive=(prompt, 0),
        model=model,
    )  # fmt: skip
    vae = flow.add(3, "VAELoader", ["pixel_space"])
    image = flow.add(
        4, "KSampler", [0, "fixed", 4, 1.0, "lcm", "simple", 1.0], model=(decoder, 1), positive=(condition, 0),
        negative=(condition, 1), latent_image=(condition, 2),
    )  # fmt: skip
    decoded = flow.add(5, "VAEDecode", samples=(image, 0), vae=(vae, 0))
    flow.add(5, "SaveImage", ["pidecode"], images=(decoded, 0))
    return flow


def all_workflows() -> dict[str, Workflow]:
    """Every workflow by its file's name."""
    flux = [
        ("UNETLoader", ["flux1-dev.safetensors", "default"]),
        ("DualCLIPLoader", ["t5xxl_fp16.safetensors", "clip_l.safetensors", "flux", "default"]),
    ]
    flux2 = [
        ("UNETLoader", ["flux2_dev_fp8mixed.safetensors", "default"]),
        ("CLIPLoader", ["mistral_3_small_flux2_fp8.safetensors", "flux2", "default"]),
    ]
    qwen = [
        ("UNETLoader", ["qwen_image_fp8_e4m3fn.safetensors", "default"]),
        ("CLIPLoader", ["qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image", "default"]),
    ]
    sd3, sdxl = (
        [("CheckpointLoaderSimple", [f"{name}.safetensors"])] for name in ("sd3.5_medium_incl_clips", "sd_xl_base_1.0")
    )
    square = (1024, 1024)
    return {
        "upscale_image": upscale(),
        "flux_early_stop": early_stop("flux/2kto4k_v1pt5", flux, 28, square, guidance=3.5),
        "flux2_early_stop": early_stop("flux2/2kto4k_v1pt5", flux2, 50, square, guidance=4.0),
        "sd3_early_stop": early_stop("sd3/2kto4k", sd3, 28, square, scheduler="sgm_uniform", cfg=4.5),
        "sdxl_early_stop": early_stop("sdxl/2kto4k", sdxl, 30, square, scheduler="normal", cfg=7.0),
        "qwen_image_early_stop": early_stop("qwenimage/2kto4k_v1pt5", qwen, 50, (1328, 1328), cfg=4.0, shift=3.1),
        "z_image_turbo": z_image(),
        "comfyui_samplers": core_samplers(),
    }


def main() -> None:
    for name, flow in all_workflows().items():
        flow.write(name)


if __name__ == "__main__":
    main()
