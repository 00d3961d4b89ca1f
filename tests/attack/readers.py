# SPDX-License-Identifier: Apache-2.0
"""Trials of everything that reads a file: each ends in a value or in one of the package's own errors."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image, PngImagePlugin

from attack.mutate import hostile_json, mutated, safetensors_bytes, split_safetensors
from pidecode.batch.jobs import OutputNaming, collect_jobs
from pidecode.cli.app import UNEXPECTED, cli
from pidecode.encoders.base import load_encoder
from pidecode.encoders.text import PromptEmbedsCache, load_prompt_embeds
from pidecode.encoders.tiny import is_tiny_encoder
from pidecode.images import load_image, load_tensor, read_metadata, save_image
from pidecode.latents.latent import Latent
from pidecode.latents.storage import count_latents
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import debug_config
from pidecode.training.checkpoint import newest_checkpoint
from pidecode.training.dataset import find_images
from pidecode.training.latent_cache import LatentShards
from pidecode.weights.detect import detect
from pidecode.weights.load import apply_lora, build_network
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import read_weights
from pidecode.weights.resolve import TINY_ENCODER, asset

Trial = list[Callable[[], object]]
"""One file and what is done with it, step by step; each step may raise PidecodeError, and nothing else."""

CONFIG = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")
_LAYER = "patch_blocks.0.attn.proj_x"


def network() -> PiDNet:
    torch.manual_seed(0)
    return PiDNet(CONFIG).requires_grad_(False).eval()


def weights_bytes() -> bytes:
    metadata = CheckpointMetadata(kind="student", config=CONFIG, space="flux2", license="Apache-2.0")
    return safetensors.torch.save(dict(network().state_dict()), metadata.to_metadata())


def latent_bytes() -> bytes:
    record = {
        "format": 1,
        "space": "flux2",
        "frame": "normalized",
        "sigma": [0.0, 0.5],
        "prompt": ["a", "b"],
        "seed": 7,
    }
    return safetensors.torch.save({"latent": torch.randn(2, 128, 2, 2)}, {"pidecode_latent": json.dumps(record)})


def _safetensors_variant(rng: Random, data: bytes) -> bytes:
    """A file with bytes changed, its header changed, or the JSON inside its metadata changed."""
    header, tensors = split_safetensors(data)
    kind = rng.randrange(4)
    if kind == 0:
        return mutated(rng, data)
    if kind == 1:
        return safetensors_bytes(hostile_json(rng, header), tensors)
    if kind == 2:
        name = rng.choice([name for name in header if name != "__metadata__"])
        return safetensors_bytes(hostile_json(rng, {name: header[name]}), tensors)
    metadata = header["__metadata__"]
    key = rng.choice([key for key in metadata if key != "format"])
    metadata[key] = hostile_json(rng, json.loads(metadata[key]))
    return safetensors_bytes(json.dumps(header), tensors)


def latent_files(rng: Random, folder: Path) -> Iterator[Trial]:
    good, path = latent_bytes(), folder / "a.safetensors"
    while True:
        data = _safetensors_variant(rng, good)

        path.write_bytes(data)
        yield [partial(count_latents, path), partial(Latent.load, path), partial(Latent.load, data)]


def weights_files(rng: Random, folder: Path) -> Iterator[Trial]:
    good, path = weights_bytes(), folder / "a.safetensors"
    while True:
        data = _safetensors_variant(rng, good)

        def trial(data: bytes = data) -> None:
            path.write_bytes(data)
            file = read_weights(path)
            metadata = detect(file)
            assert metadata.config is not None
            build_network(file.tensors, metadata.config, source=str(path))

        yield [trial]


def pickles(rng: Random, folder: Path) -> Iterator[Trial]:
    path, buffers = folder / "a.pth", []
    for legacy in (False, True):
        buffer = io.BytesIO()
        tensors = {f"net.w{index}": torch.randn(4, 3) for index in range(3)}
        torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
        buffers.append(buffer.getvalue())
    with zipfile.ZipFile(io.BytesIO(buffers[0])) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    calls = [
        b"cbuiltins\nbytearray\n", b"ctorch\nFloatTensor\n", b"cos\nsystem\n", b"ctorch\nFloatStorage\n",
        b"cbuiltins\ngetattr\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    ]  # fmt: skip
    while True:
        kind = rng.randrange(3)
        if kind == 0:
            data = mutated(rng, rng.choice(buffers))
        else:
            if kind == 1:
                content = mutated(rng, records[pickled])
            else:
                number = pickle.encode_long(rng.choice((-1, 0, 6 * 10**9, 2**62)))
                content = b"\x80\x02" + rng.choice(calls) + b"\x8a" + bytes([len(number)]) + number + b"\x85R."
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for name, value in records.items():
                    archive.writestr(name, content if name == pickled else value)
            data = buffer.getvalue()

        def trial(data: bytes = data) -> None:
            path.write_bytes(data)
            for tensor in read_weights(path).tensors.values():
                tensor.sum().item()

        yield [trial, partial(count_latents, path), partial(Latent.load, data)]


def encoders_and_adapters(rng: Random, folder: Path) -> Iterator[Trial]:
    net, encoder, path = network(), asset(TINY_ENCODER).read_bytes(), folder / "a.safetensors"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    header, tensors = split_safetensors(encoder)
    dtypes = (torch.float32, torch.float16, torch.complex64, torch.uint8, torch.int64, torch.bool, torch.float64)

    def adapt(data: bytes) -> None:
        path.write_bytes(data)
        try:
            apply_lora(net, path, 1.0)
        finally:
            finite = all(bool(value.isfinite().all()) for value in net.state_dict().values())
            net.load_state_dict(before)
            assert finite, "the weights are not finite any more"

    def load(data: bytes) -> None:
        path.write_bytes(data)
        is_tiny_encoder(path)
        load_encoder("flux2", path)

    while True:
        if rng.random() < 0.5:
            shapes = rng.choice((((2, 32), (32, 2)), ((64,), (64,)), ((2, 32, 1), (32, 2)), ((0, 32), (32, 0))))
            dtype, factor = rng.choice(dtypes[: rng.choice((1, 7))]), rng.choice((1.0, 1e4, 1e30, float("nan")))
            halves = [(torch.ones(shape) * factor).to(dtype) for shape in shapes]
            record = hostile_json(rng, {"format": 1, "rank": 2, "alpha": 2.0, "space": None, "base": None})
            named = {f"{_LAYER}.lora_{half}.weight": value for half, value in zip("AB", halves, strict=True)}
            data = safetensors.torch.save(named, {"pidecode_lora": record} if rng.random() < 0.8 else None)
            yield [lambda data=data: adapt(data)]
        else:
            metadata = json.loads(header["__metadata__"]["pidecode"])
            text = json.dumps({**header, "__metadata__": {"pidecode": hostile_json(rng, metadata)}})
            yield [lambda text=text: load(safetensors_bytes(text, tensors))]


def images(rng: Random, folder: Path) -> Iterator[Trial]:
    good = []
    for kind, mode in (
        ("PNG", "RGB"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("WEBP", "RGBA"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
    ):
        buffer = io.BytesIO()
        Image.radial_gradient("L").resize((24, 16)).convert("RGB").convert(mode if mode != "I;16" else "I").convert(
            mode
        ).save(buffer, kind)
        good.append(buffer.getvalue())
    written = folder / "own.png"
    save_image(written, Image.new("RGB", (24, 16)), metadata={"seed": 7, "prompt": "x"})
    good.append(written.read_bytes())
    while True:
        path = folder / f"a{rng.choice(('.png', '.jpg', '.webp', '.gif', '.tiff'))}"
        if rng.random() < 0.3:
            texts, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
            texts.add_text(
                "pidecode", hostile_json(rng, {"seed": 7, "prompt": "x", "sigma": [0.5]}), zip=rng.random() < 0.5
            )
            Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=texts)
            data = buffer.getvalue()
        else:
            data = mutated(rng, rng.choice(good))

        path.write_bytes(data)
        yield [partial(read_metadata, path), partial(load_image, path), partial(load_tensor, data)]


def manifests(rng: Random, folder: Path) -> Iterator[Trial]:
    (folder / "cat.png").write_bytes(b"")
    path, naming = folder / "list.jsonl", OutputNaming(out=folder / "out")
    entry = {"source": "cat.png", "out": "b/cat.png", "seed": 7, "size": [64, 64], "prompt": "x", "sigma": 0.1}
    while True:
        lines = [hostile_json(rng, entry) for _ in range(rng.choice((1, 3)))]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        data = mutated(rng, data) if rng.random() < 0.3 else data

        def trial(data: bytes = data) -> None:
            path.write_bytes(data)
            for job in collect_jobs(path, naming):
                if job.error is None:
                    job.out.resolve().relative_to((folder / "out").resolve())

        yield [trial]


def training_files(rng: Random, folder: Path) -> Iterator[Trial]:
    shards = LatentShards(folder / "shards", "x")
    shards.put("a", torch.zeros(4, 2, 2))
    shards.flush()
    shard = next((folder / "shards").glob("*.safetensors"))
    shard_bytes = shard.read_bytes()
    good = safetensors.torch.save({"weights.net.a": torch.zeros(3)})
    checkpoint = folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    data = folder / "images"
    data.mkdir()
    Image.new("RGB", (32, 32)).save(data / "a.png")

    def resume(state: str, tensors: bytes) -> None:
        (checkpoint / "state.json").write_bytes(state.encode("utf-8", "surrogatepass"))
        (checkpoint / "tensors.safetensors").write_bytes(tensors)
        newest_checkpoint(folder / "checkpoints")

    def caption(text: bytes) -> None:
        (data / "a.json").write_bytes(text)
        for entry in find_images(data).entries:
            entry.read_caption().encode("utf-8", "replace")

    def cached(content: bytes) -> None:
        shard.write_bytes(content)
        again = LatentShards(folder / "shards", "x")
        again.get("a")

    while True:
        kind = rng.randrange(3)
        if kind == 0:
            state = hostile_json(rng, {"format": 1, "step": 3, "metrics": {"loss": 0.5}, "images": "x"})
            tensors = mutated(rng, good) if rng.random() < 0.5 else good
            yield [lambda state=state, tensors=tensors: resume(state, tensors)]
        elif kind == 1:
            text = hostile_json(rng, {"caption": "a cat", "text": "b"}) if rng.random() < 0.9 else "[" * 100_000
            yield [lambda text=text: caption(text.encode("utf-8", "surrogatepass"))]
        else:
            yield [partial(cached, mutated(rng, shard_bytes))]


def prompt_states(rng: Random, folder: Path) -> Iterator[Trial]:
    path, cache = folder / "a.safetensors", PromptEmbedsCache(folder / "cache")
    entries = {"format": 1, "entries": [{"prompt": "a", "identity": {"model": "m"}}]}
    good = safetensors.torch.save({"states.0": torch.zeros(4, 8)}, {"pidecode_prompts": json.dumps(entries)})
    while True:
        data = _safetensors_variant(rng, good)

        path.write_bytes(data)
        yield [lambda: cache.import_from(path), lambda: load_prompt_embeds(path)]


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in JSON")


def command_line(rng: Random, folder: Path) -> Iterator[Trial]:
    """`pidecode info` and `decode` of hostile files: a known exit code, JSON that is JSON, nothing a terminal obeys."""
    goods = {"a.safetensors": (latent_bytes(), weights_bytes())}
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    goods["a.png"] = (buffer.getvalue(),)

    def trial(path: Path, data: bytes, arguments: list[str]) -> None:
        path.write_bytes(data)
        result = CliRunner().invoke(cli, arguments)
        path.unlink()
        shown = result.output
        assert result.exit_code not in (UNEXPECTED, -1), shown[-500:]
        assert not set(shown) & set("\x1b\x9b\x07\u202e"), repr(shown[-500:])
        if "--json" in arguments and result.exit_code == 0:
            json.loads(result.stdout, parse_constant=_no_constant)

    while True:
        name = rng.choice(list(goods))
        good = rng.choice(goods[name])
        data = _safetensors_variant(rng, good) if name.endswith("safetensors") else mutated(rng, good)
        path = folder / (rng.choice(("", "\x1b[31m", "\u202e", "ü ")) + name)
        command = rng.choice(
            (["info"], ["info", "--json"], ["convert", str(folder / "out.safetensors"), "--overwrite"])
        )
        arguments = [command[0], str(path), *command[1:]]
        yield [lambda path=path, data=data, arguments=arguments: trial(path, data, arguments)]
