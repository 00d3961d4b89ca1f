# SPDX-License-Identifier: Apache-2.0
"""`pidecode generate`: prompts in, images out, drawn by a diffusers pipeline and decoded by PiD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli.common import emit, json_option, progress, threads_option
from pidecode.errors import DownloadError, FileError, SettingError
from pidecode.options import COLOR_FIXES
from pidecode.registry.spaces import GENERATION, get_image_model
from pidecode.units import parse_size

if TYPE_CHECKING:
    from pidecode.decoder import PixelDecoder
    from pidecode.integrations.diffusers import PipelineProgress

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("--prompts", "prompt_file", type=_PATH, help="File with one prompt per line; # begins a comment.")
@click.option("--space", "model", type=click.Choice(list(GENERATION)), metavar="NAME", required=True,
              help=f"Image model: {', '.join(GENERATION)}.")  # fmt: skip
@click.option("--size", default="2048x2048", show_default=True, help="Of the finished images, WIDTHxHEIGHT.")
@click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="Several make several images.")
@click.option("--steps", type=click.IntRange(min=1), help="Of the diffusion; the model's own number if not given.")
@click.option("--stop-after", metavar="N", help="End the diffusion after step N and decode that; or `recommended`.")
@click.option("--save-latents", is_flag=True, help="Keep the latents, to decode favorites again.")
@click.option("--compare", type=click.Choice(["vae"]), help="Also put the model's own decode beside each image.")
@click.option("-o", "--out", type=_PATH, default=Path("images"), show_default=True, help="Folder to write to.")
@click.option("--pipeline", "source", help="Folder or hub repository of the pipeline, if not the model's own.")
@click.option("-m", "--model", "decoder", help="PiD decoder: a name or file; the official one if not given.")
@click.option("--variant", metavar="NAME", help="Variant of the decoder: 2k, 2kto4k, ...")
@click.option("--color-fix", type=click.Choice(COLOR_FIXES), help="Correct colors, or all detail, by the VAE's decode.")
@click.option("--arguments", default="{}", metavar="JSON", help="More arguments for the pipeline's call.")
@threads_option
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; chosen for you if not given.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Number format; chosen if not given."
)
@json_option
def generate(prompts: tuple[str, ...], prompt_file: Path | None, as_json: bool, **wish: Any) -> None:
    """Draw images from prompts, at four times the size the image model draws.

    First all prompts are drawn, then the image model leaves the memory and PiD decodes. A run that was interrupted
    goes on where it stopped when it is given again.
    """
    import torch

    from pidecode.devices import select_device
    from pidecode.integrations.text_to_image import GenerationJob
    from pidecode.integrations.text_to_image import generate as run
    from pidecode.options import DecodeOptions

    job = GenerationJob(
        model=wish["model"],
        prompts=(*prompts, *(_lines(prompt_file) if prompt_file else ())),
        out=wish["out"],
        seeds=wish["seeds"] or (0,),
        size=parse_size(wish["size"]),
        source=wish["source"],
        num_steps=wish["steps"],
        stop_after=_stop(wish["stop_after"]),
        compare=wish["compare"] is not None,
        keep_latents=wish["save_latents"],
        arguments=_arguments(wish["arguments"]),
    )
    device = select_device(wish["device"])
    narrow = torch.float32 if device.type == "cpu" else torch.bfloat16
    stage = ["diffusion"]
    with progress(0, "drawing") as bar:

        def report(at: PipelineProgress) -> None:
            if at.stage != stage[0]:
                stage[0] = at.stage
                bar.reset()
                bar.set_description(at.stage)
            bar.total = at.num_steps
            bar.update(at.step - bar.n)

        written = run(
            job,
            lambda: _decoder(wish),
            device=device,
            dtype=getattr(torch, wish["dtype"]) if wish["dtype"] else narrow,
            options=DecodeOptions(color_fix=wish["color_fix"]),
            progress_callback=report,
        )
    rows = [
        {"image": str(one.image), "latent": one.latent and str(one.latent),
         "comparison": one.comparison and str(one.comparison), "fidelity": one.fidelity}
        for one in written
    ]  # fmt: skip
    lines = [f"{row['image']}" + (f"  ({row['fidelity']})" if row["fidelity"] else "") for row in rows]
    emit(rows, "\n".join(lines), as_json=as_json)


def _decoder(wish: dict[str, Any]) -> PixelDecoder:
    """The decoder asked for; else the official one; else, for FLUX.2, the small one that ships with the package."""
    import torch

    from pidecode.decoder import PixelDecoder

    space = get_image_model(wish["model"]).space
    given: dict[str, Any] = {
        "space": space,
        "variant": wish["variant"],
        "device": wish["device"],
        "dtype": getattr(torch, wish["dtype"]) if wish["dtype"] else None,
    }
    if wish["decoder"]:
        return PixelDecoder.from_pretrained(wish["decoder"], **given)
    try:
        return PixelDecoder.from_pretrained("nvidia/PiD", **given)
    except DownloadError:
        if space != "flux2" or wish["variant"]:
            raise
        click.echo("The official decoder is not here; the small one that ships with pidecode is used.", err=True)
        return PixelDecoder.from_pretrained("tiny", device=wish["device"], dtype=given["dtype"])


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise FileError(f"{file} cannot be read as text: {fault}.") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _stop(text: str | None) -> Any:
    if text is None or text == "recommended":
        return text
    if not text.isdigit():
        raise SettingError(f"--stop-after is {text!r}; it takes a step, counted from 1, or `recommended`.")
    return int(text)


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as fault:
        raise SettingError(f"--arguments is not JSON: {fault}.") from None
    if not isinstance(found, dict):
        raise SettingError('--arguments must be a JSON table, like {"guidance_scale": 3}.')
    return found
