# SPDX-License-Identifier: Apache-2.0
"""What the decoders give for fixed inputs, recorded: `python tests/recorded.py` writes the file that the test compares.

Each output is kept as the SHA-256 of its float32 bytes and as every so many of its values. A CPU with the
instruction set that the file was recorded on must give the same bytes; another rounds elsewhere, so there the kept
values must agree within rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pidecode import Latent, PixelDecoder
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import debug_config
from pidecode.registry.spaces import SPACES
from pidecode.weights.metadata import CheckpointMetadata

FILE = Path(__file__).parent / "golden" / "outputs.safetensors"
KEPT = 997
"""About this many values of each output are kept."""
VOLATILE = ("versions", "device")


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def synthetic_image(width: int, height: int, seed: int) -> Tensor:
    """A procedural image [1,3,H,W] in [-1, 1]: a gradient, waves, a hard edge and a little grain."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.stack([torch.sin((3 + k + seed) * 6.28 * (x * (k + 1) / 3 + y)) for k in range(3)])
    edge = ((x + 0.5 * y) > 0.6).float() * 0.5
    grain = noise(3, height, width, seed=seed) * 0.03
    return (0.4 * waves + edge + x - 0.6 * y - 0.2 + grain)[None].clamp(-1, 1)


def random_decoder(space: str, kind: str, **changes: Any) -> PixelDecoder:
    """A debug network of a space with random weights everywhere."""
    facts = SPACES[space]
    config = debug_config(latent_channels=facts.channels, latent_down=facts.down, scale=facts.scale, **changes)
    net = PiDNet(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            value = torch.randn(parameter.shape, generator=generator) / fan**0.5
            parameter.copy_(value if parameter.ndim > 1 else value * 0.1 + 0.5)
    return PixelDecoder(net, CheckpointMetadata(kind=kind, space=space, config=config), name="random")


def tiny_outputs() -> Iterator[tuple[str, Tensor]]:
    tiny = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    for height, width, batch, sigma in ((2, 3, 1, 0.0), (7, 5, 1, 0.4), (2, 3, 2, 0.0)):
        latent = Latent(noise(batch, 128, height, width, seed=batch + height), "flux2", sigma)
        yield f"tiny.decode.{height}x{width}.b{batch}.sigma{sigma}", tiny.decode(latent).tensor
    for width, height in ((64, 48), (50, 70), (33, 17)):
        image = synthetic_image(width, height, seed=width)
        for color_fix in ("off", "coarse", "fine", "back-projection"):
            for fit in ("pad", "crop"):
                made = tiny.upscale(image, fit=fit, color_fix=color_fix).tensor
                yield f"tiny.upscale.{width}x{height}.{color_fix}.{fit}", made
        yield f"tiny.encode.{width}x{height}", tiny.encode(image, fit="crop").tensor


def random_outputs() -> Iterator[tuple[str, Tensor]]:
    for space in SPACES:
        facts = SPACES[space]
        for kind in ("student", "teacher"):
            decoder = random_decoder(space, kind)
            latent = Latent(noise(1, facts.channels, 3, 2, seed=3), space, 0.2)
            states = noise(1, 10, 16, seed=5)
            steps = {"num_steps": 4} if kind == "student" else {"num_steps": 5, "guidance_scale": 1.0}
            made = decoder.decode(latent, seed=11, prompt_embeds=states, **steps).tensor
            yield f"random.{space}.{kind}", made


@torch.inference_mode()
def outputs() -> dict[str, Tensor]:
    """Every recorded output, float32, computed on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: value.float().contiguous() for name, value in (*tiny_outputs(), *random_outputs())}
    finally:
        torch.set_num_threads(threads)


def digest(value: Tensor) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()


def samples(value: Tensor) -> Tensor:
    return value.flatten()[:: max(1, value.numel() // KEPT)].clone()


def machine() -> str:
    """What decides the order in which a CPU adds: its instructions and torch's version."""
    return f"{torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def read() -> tuple[dict[str, str], dict[str, Tensor]]:
    """The recorded digests (and the machine) and the recorded samples."""
    with safe_open(FILE, "pt") as file:
        digests = json.loads(file.metadata()["digests"])
        return digests, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def main() -> None:
    made = outputs()
    digests = {name: digest(value) for name, value in made.items()} | {"machine": machine()}
    FILE.parent.mkdir(exist_ok=True)
    save_file({name: samples(value) for name, value in made.items()}, FILE, {"digests": json.dumps(digests)})
    print(f"{len(made)} outputs recorded on {digests['machine']}")


if __name__ == "__main__":
    main()
