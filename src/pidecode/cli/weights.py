# SPDX-License-Identifier: Apache-2.0
"""`pidecode models`, `pull`, `captions`, `convert` and `info`: files of weights and text states, and what files are."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli import common
from pidecode.errors import CheckpointError, FileError, PidecodeError, SettingError
from pidecode.registry.checkpoints import CHECKPOINTS, ENCODERS, TEXT_ENCODER, TINY_ENCODER
from pidecode.registry.spaces import ALIASES, SPACES
from pidecode.strict_json import JSONError, parse_json
from pidecode.units import format_bytes, printable
from pidecode.weights import safetensors

if TYPE_CHECKING:
    from tqdm import tqdm

KINDS = click.Choice(["feed-forward", "student", "teacher", "backbone"])
PULLABLE = [*SPACES, *ALIASES, *dict.fromkeys(name for name, _, _ in CHECKPOINTS if name not in SPACES), "tiny"]


@click.command(cls=common.GroupedCommand)
@click.argument("model", type=click.Choice(PULLABLE), metavar="MODEL")
@click.option("--variant", metavar="NAME", help="Variant of the decoder: 2k, 2kto4k, 2kto4k_v1pt5.")
@click.option("--kind", type=KINDS, help="A teacher, or the bare backbone.")
@click.option("--no-encoder", is_flag=True, help="Leave out the encoder: latents decode, images cannot be upscaled.")
@click.option("--no-text", is_flag=True, help="Leave out the text encoder (about 5 GB).")
@click.option("--accept-license", is_flag=True, help="You have read the license and keep to it.")
@common.json_option
def pull(model: str, as_json: bool, accept_license: bool, **asked: Any) -> None:
    """Download the decoder for MODEL, its encoder and the text encoder.

    MODEL is a latent space or an image model that uses one: flux, flux2-klein-4b, sdxl, ... The license is shown
    first. A broken download goes on where it stopped. Afterwards everything works offline.
    """
    from tqdm import tqdm

    from pidecode.weights.download import download_checkpoint

    with ExitStack() as bars:
        drawn: dict[str, tqdm[Any]] = {}  # one bar per file

        def show(step: Any) -> None:
            if step.file not in drawn:
                bars.close()  # that of the file before
                bar = tqdm(
                    desc=printable(step.file.rpartition("/")[2]), unit="B", unit_scale=True, file=sys.stderr,
                    disable=None, leave=False, dynamic_ncols=True,
                )  # fmt: skip
                drawn[step.file] = bars.enter_context(bar)
            drawn[step.file].total = step.total
            drawn[step.file].update(step.done - drawn[step.file].n)

        pulled = download_checkpoint(
            model, asked["variant"], kind=asked["kind"], accept_license=accept_license,
            encoder=not asked["no_encoder"], text=not asked["no_text"], on_progress=show,
        )  # fmt: skip
    if asked["no_text"]:
        hint = "Prompts need their states: `pidecode captions export` writes them where the text encoder is."
        common.echo(hint, err=True)
    places = {name: value for name, value in asdict(pulled).items() if value}
    lines = [f"{name.replace('_', ' '):13s} {path}" for name, path in places.items()]
    common.emit(places, "\n".join(lines), as_json=as_json)


@click.group()
def captions() -> None:
    """Keep prompts' text states in files, so that machines without the text encoder can decode with them."""


@captions.command(cls=common.GroupedCommand)
@click.argument("prompts", nargs=-1)
@common.prompts_option
@click.option("-o", "--out", type=common.PATH, default=Path("captions.safetensors"), show_default=True,
              help="File to write.")  # fmt: skip
@common.text_encoder_option
@common.device_option
@common.overwrite_option
@common.json_option
def export(prompts: tuple[str, ...], prompt_file: Path | None, out: Path, as_json: bool, **given: Any) -> None:
    """Write the text states of PROMPTS to one file.

    An empty text "" is a prompt, that of latents without one. `decode --prompt-embeds FILE` reads the file, and so do
    `attach` and the ComfyUI nodes; `captions import FILE` keeps its states for all commands.
    """
    from pidecode.devices import select_device
    from pidecode.encoders.text import PromptEmbedsCache, TextEncoder, TextOptions, export_prompt_embeds

    texts = [*prompts, *common.prompt_lines(prompt_file)]
    if not texts:
        raise SettingError('No prompt came; give at least one ("" is the empty one), or --prompts FILE.')
    model = given["text_encoder"]
    options = TextOptions() if model is None else TextOptions(model=str(model))
    with common.WorkBar("encoding prompts"):
        encoder = TextEncoder(options, device=select_device(given["device"]), states=PromptEmbedsCache())
        count = export_prompt_embeds(out, texts, encoder, overwrite=given["overwrite"])
    size = out.stat().st_size
    said = {"file": str(out), "prompts": count, "bytes": size}
    common.emit(said, f"{out}  {count} prompts, {format_bytes(size)}", as_json=as_json)


@captions.command("import", cls=common.GroupedCommand)
@click.argument("file", type=common.PATH)
@common.json_option
def import_(file: Path, as_json: bool) -> None:
    """Keep the text states in FILE, so that every command here finds them without the text encoder."""
    from pidecode.encoders.text import PromptEmbedsCache, TextOptions

    cache = PromptEmbedsCache()
    count = cache.import_from(file, TextOptions().identity())
    said = {"prompts": count, "folder": str(cache.folder)}
    common.emit(said, f"{count} prompts kept in {cache.folder}", as_json=as_json)


@click.command(cls=common.GroupedCommand)
@click.argument("source", type=common.PATH)
@click.argument("target", type=common.PATH)
@common.space_option
@click.option("--variant", metavar="NAME", help="Release it belongs to: 2k, 2kto4k, 2kto4k_v1pt5.")
@click.option("--kind", type=KINDS, help="What it is, if the file does not say.")
@common.output_dtype_option
@common.overwrite_option
@common.json_option
def convert(source: Path, target: Path, **asked: Any) -> None:
    """Write the weights SOURCE as one TARGET.safetensors that says what it is.

    SOURCE is an official .pth, a ComfyUI repackaging, or any PiD .safetensors. The result carries configuration,
    space, variant and license, and loads with no further argument.
    """
    from pidecode.weights.convert import convert as write
    from pidecode.weights.detect import Overrides

    overrides = Overrides(space=asked["space"], variant=asked["variant"], kind=asked["kind"])
    with common.WorkBar("converting"):
        metadata = write(source, target, overrides=overrides, dtype=asked["dtype"], overwrite=asked["overwrite"])
    size, about = target.stat().st_size, ("kind", "space", "variant", "license")
    said = {"file": str(target), "bytes": size, **{name: getattr(metadata, name) for name in about}}
    words = f"{target}  {metadata.kind} for {metadata.space}, {format_bytes(size)}, {metadata.license}"
    common.emit(said, words, as_json=asked["as_json"])


IN_PACKAGE = "in the package"
READER = "text encoder"


def asset(name: str) -> Path | None:
    """A file that ships with the package, if it is there."""
    path = Path(str(resources.files("pidecode") / "assets" / name))
    return path if path.is_file() else None


def _row(path: Path | None, **known: Any) -> dict[str, Any]:
    size = known.pop("bytes", None)
    if path is not None:
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    return {"variant": None, "bytes": size, "commercial": None, **known, "path": str(path) if path else None}


def rows() -> list[dict[str, Any]]:
    """Every model, encoder and text encoder, as plain values; `path` is None for what is not on this disk."""
    from pidecode.weights.download import cached_files, checkpoint_files
    from pidecode.weights.resolve import HubCache

    hub, text = HubCache(), None
    own: list[dict[str, Any]] = []
    released: list[dict[str, Any]] = []
    encoders: dict[str, dict[str, Any]] = {}
    for row in CHECKPOINTS.values():
        if row.repository is None:
            places, listed = {"decoder": asset(row.path)}, own
        else:
            places, listed = {part.title: cached_files(part, hub) for part in checkpoint_files(row)}, released
        listed.append(_row(
            places["decoder"], name=row.name, kind=row.kind, space=row.space, variant=row.variant,
            source=row.repository or IN_PACKAGE, bytes=row.approximate_bytes, license=row.license.name,
            commercial=row.license.commercial,
        ))  # fmt: skip
        text = text or places.get("text encoder")
        if row.repository and row.space in ENCODERS and row.space not in encoders:
            encoders[row.space] = _row(
                places.get("encoder"), name=row.space, kind="encoder", space=row.space,
                source=ENCODERS[row.space].repository, license="see its model card",
            )  # fmt: skip
    own.append(_row(
        asset(TINY_ENCODER), name="flux2/tiny", kind="encoder", space="flux2", variant="tiny", source=IN_PACKAGE,
        license="Apache-2.0", commercial=True,
    ))  # fmt: skip
    name = TEXT_ENCODER.rpartition("/")[2]
    reader = _row(text, name=name, kind=READER, space=None, source=TEXT_ENCODER, license="Gemma terms")
    return [*own, *released, *encoders.values(), reader]


def checks(known: Sequence[dict[str, Any]]) -> Iterator[common.Check]:
    """What the files on this disk allow, for `pidecode doctor`."""
    there = {(row["kind"], row["name"]) for row in known if row["path"]}
    tiny = {("feed-forward", "flux2/tiny"), ("encoder", "flux2/tiny")} <= there
    lost = "its weights are missing from the package; install it again"
    yield common.Check("`tiny`, the model that ships here", tiny, "images and FLUX.2 latents" if tiny else lost)
    text = any(kind == READER for kind, _ in there)
    for space in dict.fromkeys(row["space"] for row in known if row["kind"] == "student"):
        released = [row for row in known if row["kind"] == "student" and row["space"] == space]
        found = [row["variant"] for row in released if row["path"] and row["license"] != "Apache-2.0"]
        if not found:
            yield common.Check(f"released decoders for {space}", False, f"not on this disk: pidecode pull {space}")
            continue
        lacking = [] if text else ["the text encoder, so prompts must come as ready-made states"]
        if ("encoder", space) not in there:
            lacking.append("the encoder, so latents decode but images cannot be upscaled")
        missing = f"; without {' and without '.join(lacking)}: pidecode pull {space}" if lacking else ""
        yield common.Check(f"released decoders for {space}", True, ", ".join(found) + missing)


def _line(row: dict[str, Any]) -> dict[str, str]:
    free = {True: "", False: ", non-commercial", None: ""}[row["commercial"]]
    return {
        "name": row["name"], "kind": row["kind"], "on disk": "yes" if row["path"] else "no",
        "size": format_bytes(row["bytes"]), "license": row["license"] + free, "from": row["source"],
    }  # fmt: skip


@click.command(cls=common.GroupedCommand)
@click.option("--on-disk", is_flag=True, help="Only those that are here.")
@common.json_option
def models(on_disk: bool, as_json: bool) -> None:
    """List the models there are, and which are on this disk."""
    listed = [row for row in rows() if row["path"] or not on_disk]
    common.emit(listed, common.table([_line(row) for row in listed]), as_json=as_json)


IMAGES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
FOREIGN_LATENTS = ("latent_tensor", "samples", "latents", "latent")  # the first two are ComfyUI's
PICKLES = (b"PK\x03\x04", b"\x80")


def describe(path: Path) -> dict[str, Any]:
    """What the file is, as plain values. Raises FileError for a file that is nothing we know."""
    if os.path.isdir(path):
        from pidecode.weights.load import LORA_FILES

        path = next((path / name for name in LORA_FILES if os.path.isfile(path / name)), path)
    size, start = safetensors.check_file(path), safetensors.read_start(path)
    known: dict[str, Any] = {"file": str(path), "bytes": size}
    if safetensors.looks_like_safetensors(start):
        return known | _safetensors(safetensors.read_header(path), path)
    if start.startswith(IMAGES):
        return known | _image(path)
    from pidecode.images.read import refuse_other_formats  # load torch
    from pidecode.latents.storage import read_latent
    from pidecode.weights.read import read_weights

    other = known | {"what": "latent", "made by": "another program; name its --space when decoding"}
    if start.startswith(b"\x93NUMPY") or (start.startswith(PICKLES[0]) and b".npy" in start[:64]):
        return other | {"format": "NumPy", "shape": list(read_latent(path).tensor.shape)}
    if start.startswith(PICKLES):
        try:
            shapes = read_weights(path, check_values=False).shapes
        except CheckpointError:
            with suppress(PidecodeError):  # one tensor alone
                return other | {"format": "torch.save", "shape": list(read_latent(path).tensor.shape)}
            raise
        if named := _latent_in(shapes):
            return other | {"format": "torch.save", "shape": list(shapes[named])}
        return known | {"what": "weights", "format": "pickle, tensors only"} | _foreign(shapes, path, {})
    with path.open("rb") as file:
        refuse_other_formats(str(path), file)
    if what := safetensors.foreign_kind(start):
        raise FileError(f"{path} is {what}.")
    raise FileError(f"{path} is no image, latent or weights file that pidecode knows.")


def _latent_in(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The tensor of a file that is a latent: by its name, or the only one if it has the channels of a space."""
    named = next((name for name in FOREIGN_LATENTS if name in shapes), None)
    if named is None and len(shapes) == 1:
        ((named, shape),) = shapes.items()
        if len(shape) not in (4, 5) or shape[1] not in {space.channels for space in SPACES.values()} or shape[0] >= 64:
            return None
    return named if named is not None and len(shapes[named]) in (3, 4, 5) else None


def _image(path: Path) -> dict[str, Any]:
    from PIL import Image

    from pidecode.images import frames_in, load_image, read_metadata

    frames = frames_in(path)
    width, height = frames.sizes[0] if frames else load_image(path).size  # with all its checks first
    with Image.open(path) as opened:
        known = {"what": "image", "format": opened.format, "width": width, "height": height}
    several = {"pages" if known["format"] == "TIFF" else "frames": len(frames)} if frames else {}
    return known | several | {"metadata": read_metadata(path)}


def _safetensors(header: safetensors.Header, path: Path) -> dict[str, Any]:
    if "pidecode_latent" in header.metadata:
        shapes = [list(entry.shape) for entry in header.tensors.values()]
        return {"what": "latent", "shape": shapes[0]} | _record(header.metadata["pidecode_latent"], path)
    named = _latent_in(header.shapes)
    if named is not None:
        program = "ComfyUI" if named in FOREIGN_LATENTS[:2] else "another program; name its --space when decoding"
        return {"what": "latent", "shape": list(header.tensors[named].shape), "made by": program}
    dtypes = sorted({entry.dtype for entry in header.tensors.values()})
    known = {"what": "weights", "format": "safetensors", "dtypes": dtypes}
    if "pidecode" in header.metadata:
        return known | _counts(header.shapes) | {"record": _record(header.metadata["pidecode"], path)}
    if notes := [name for name in header.tensors if name.endswith(".comfy_quant")]:
        from pidecode.weights.read import EIGHT_BITS, layer_formats

        found = layer_formats(safetensors.read_safetensors(path, notes)[1], header.metadata)
        unread = [name for name in found if name not in EIGHT_BITS.values()]
        known["quantized"] = ", ".join(found) + (" (not read here)" if unread else "")
    return known | _foreign(header.shapes, path, header.metadata)


def _record(text: str, path: Path) -> dict[str, Any]:
    try:
        record = parse_json(text)
    except JSONError as error:
        raise CheckpointError(f"The metadata of {path} cannot be read: {error}. The file is damaged.") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"The metadata of {path} is not a table; the file is damaged.")
    return record


def _counts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {"tensors": len(shapes), "parameters": sum(math.prod(shape) for shape in shapes.values())}


def _foreign(shapes: Mapping[str, tuple[int, ...]], path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What names and shapes show of weights that say nothing of themselves."""
    from pidecode.weights.detect import infer_shape
    from pidecode.weights.load import lora_summary

    counts = _counts(shapes)
    if any("lora" in name for name in shapes):
        about = "a LoRA adapter; --lora adds it to a student or teacher decoder"
        return counts | {"network": about} | lora_summary(path, shapes, metadata)
    try:
        structure = infer_shape(shapes, str(path))
    except CheckpointError:
        return counts | {"network": "none of PiD's: an autoencoder, a text encoder, or something else"}
    seen = dict(structure.values)
    return counts | {"network": f"PiD, {structure.generation or 'of no released design'}", "seen": seen}


def _lines(values: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Nested values, a line each, indented."""
    width = max(14, *map(len, values), 0)
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield f"{'  ' * depth}{name}"
            yield from _lines(value, depth + 1)
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{'  ' * depth}{name:{width}s} {shown}"


def _report(found: dict[str, Any]) -> str:
    shown = {name: value for name, value in found.items() if name != "bytes"}
    if found.get("metadata", "") is None:
        shown["metadata"] = "none: this image was not made by pidecode, or its metadata were removed"
    return "\n".join(_lines(shown | {"size": format_bytes(found["bytes"])}))


@click.command(cls=common.GroupedCommand)
@click.argument("file", type=common.PATH)
@common.json_option
def info(file: Path, as_json: bool) -> None:
    """Show what FILE is: an image and its metadata, a latent, or weights."""
    with common.WorkBar("reading"):
        found = describe(file)
    common.emit(found, _report(found), as_json=as_json)
