# SPDX-License-Identifier: Apache-2.0
"""`pidecode generate`: images from prompts by a diffusers pipeline, decoded by PiD."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli import common
from pidecode.errors import DownloadError, SettingError
from pidecode.registry.checkpoints import REPOSITORY
from pidecode.registry.spaces import IMAGE_MODELS, get_image_model
from pidecode.strict_json import JSONError, parse_json
from pidecode.units import parse_size

if TYPE_CHECKING:
    from pidecode.decoder import PixelDecoder
    from pidecode.integrations.diffusers import PipelineProgress
    from pidecode.integrations.text_to_image import PixelDiT

_OWN = ("seed", "size", "prompt")  # decode options that the command takes in another way: for a whole run


@click.command(cls=common.GroupedCommand)
@click.argument("prompts", nargs=-1)
@common.prompts_option
@click.option("--space", "model", type=click.Choice([*IMAGE_MODELS, "pixeldit"]), metavar="NAME", required=True,
              help=f"Image model: {', '.join(IMAGE_MODELS)}; or pixeldit, which makes pixels.")  # fmt: skip
@click.option("--size", default="2048x2048", show_default=True, help="Of the finished images, WIDTHxHEIGHT.")
@click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="Several make several images.")
@click.option("--num-inference-steps", type=click.IntRange(min=1), metavar="N",
              help="Steps of the image model; its default if not given.")  # fmt: skip
@click.option("--stop-after", metavar="N", help="End the diffusion after step N and decode that; or `recommended`.")
@click.option("--save-latents", is_flag=True, help="Keep the latents, to decode favorites again.")
@click.option("--compare", type=click.Choice(["vae"]), help="Also put the model's own decode beside each image.")
@click.option("-o", "--out", type=common.PATH, default=Path("images"), show_default=True, help="Folder to write to.")
@click.option("--pipeline", "source", help="Folder or hub repository of the pipeline, if not the model's own.")
@click.option("-m", "--model", "decoder", shell_complete=common.complete_models,
              help="PiD decoder: a name or file; the official one if not given.")  # fmt: skip
@common.variant_option
@common.text_encoder_option
@common.decode_options("decode", exclude=_OWN)
@click.option("--arguments", default="{}", metavar="JSON", help="More arguments for the pipeline's call.")
@common.threads_option
@common.device_option
@common.dtype_option
@common.json_option
def generate(prompts: tuple[str, ...], prompt_file: Path | None, as_json: bool, **given: Any) -> None:
    """Generate images from PROMPTS at four times the size of the image model.

    The image model first makes the latents of all prompts and is then unloaded; after that PiD decodes them. The same
    command resumes an interrupted run. PixelDiT (--space pixeldit, its weights by --model) needs no decoder.
    """
    with common.WorkBar() as bar:
        rows = _generate(prompts, prompt_file, given, bar)
    lines = [row["image"] + (f"  ({row['drift']})" if row["drift"] else "") for row in rows]
    common.emit(rows, "\n".join(lines), as_json=as_json)


def _generate(
    prompts: tuple[str, ...], prompt_file: Path | None, given: dict[str, Any], bar: common.WorkBar
) -> list[dict[str, Any]]:
    """Run the pipeline and the decoder; returns what was written."""
    from pidecode.integrations import text_to_image

    try:
        arguments = parse_json(given["arguments"])
    except JSONError as fault:
        raise SettingError(f"--arguments is not JSON that is accepted: {fault}.") from None
    if not isinstance(arguments, dict):
        raise SettingError('--arguments must be a JSON object, like {"guidance_scale": 3}.')
    stop_after = given["stop_after"]
    if stop_after not in (None, "recommended"):
        if not stop_after.isdigit():
            raise SettingError(f"--stop-after is {stop_after!r}; it takes a step, counted from 1, or `recommended`.")
        stop_after = int(stop_after)
    job = text_to_image.GenerationJob(
        model=given["model"], prompts=(*prompts, *common.prompt_lines(prompt_file)), out=given["out"],
        seeds=given["seeds"] or (0,), size=parse_size(given["size"]), source=given["source"],
        num_steps=given["num_inference_steps"], stop_after=stop_after,
        compare=given["compare"] is not None, keep_latents=given["save_latents"],
        arguments=arguments,
    )  # fmt: skip
    common.set_threads(given["threads"])
    options = common.take_decode_options(given, exclude=_OWN)
    device, dtype = common.pipeline_device(given["device"], given["dtype"])
    bar.show("loading the image model")
    stage = ""

    def report(at: PipelineProgress) -> None:
        nonlocal stage
        if at.stage != stage:
            stage = at.stage
            bar.expect([1.0])
        bar.show(f"{stage}, step {at.step} of {at.num_steps}", at.step / max(1, at.num_steps))

    if job.model == "pixeldit":
        if options.num_steps is not None or given["variant"] is not None:
            raise SettingError(
                "PixelDiT takes its steps by --num-inference-steps, and has one variant; leave those out."
            )
        written = text_to_image.generate_pixels(
            job, lambda: _load_pixeldit(given), options=options, progress_callback=report
        )
    else:
        with suppress(ImportError):  # its bars would be drawn over this one
            import_module("diffusers").utils.logging.disable_progress_bar()
        written = text_to_image.generate(
            job, lambda: _load_decoder(given), device=device, dtype=dtype, options=options, progress_callback=report
        )
    return [{name: value and str(value) for name, value in asdict(one).items()} for one in written]


def _load_pixeldit(args: dict[str, Any]) -> PixelDiT:
    from pidecode.integrations.text_to_image import PIXELDIT, PixelDiT

    return PixelDiT.from_pretrained(
        args["decoder"] or PIXELDIT, device=args["device"], dtype=common.torch_dtype(args["dtype"]),
        text_encoder=args["text_encoder"],
    )  # fmt: skip


def _load_decoder(args: dict[str, Any]) -> PixelDecoder:
    """The decoder asked for; else the official one; else, for FLUX.2 latents, `tiny`."""
    from pidecode.decoder import PixelDecoder

    space = get_image_model(args["model"]).space
    place: dict[str, Any] = {"device": args["device"], "dtype": common.torch_dtype(args["dtype"])}
    try:
        return PixelDecoder.from_pretrained(
            args["decoder"] or REPOSITORY, space=space, variant=args["variant"], text_encoder=args["text_encoder"],
            **place,
        )  # fmt: skip
    except DownloadError:
        if args["decoder"] or space != "flux2" or args["variant"]:
            raise
        common.echo("The official decoder is not on this disk; `tiny` is used.", err=True)
        return PixelDecoder.from_pretrained("tiny", **place)
