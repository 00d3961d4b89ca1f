# SPDX-License-Identifier: Apache-2.0
"""PixelDecoder: what `decode`, `upscale` and `from_pretrained` promise, on small networks of the real classes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pidecode import PixelDecoder
from pidecode.errors import Cancelled, CheckpointError, ImageError, LatentError, SettingError, SizeError
from pidecode.images import read_metadata
from pidecode.latents.latent import Latent
from pidecode.registry.configs import debug_config
from pidecode.sampling import Progress, Step
from pidecode.weights.metadata import CheckpointMetadata
from random_networks import normal_net

FLUX2 = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")


def quarter_means(images: Tensor) -> Tensor:
    """A stand-in encoder: block means of the image in the latent's place; sizes as FLUX.2's."""
    cells = torch.nn.functional.avg_pool2d(images, 16)
    return cells.repeat(1, 43, 1, 1)[:, :128]


@pytest.fixture
def decoder() -> PixelDecoder:
    identity = CheckpointMetadata(kind="student", config=FLUX2, space="flux2", license="Apache-2.0")
    return PixelDecoder(normal_net(FLUX2), identity, name="small", encoder=quarter_means)


@pytest.fixture
def prompted() -> PixelDecoder:
    config = debug_config()
    return PixelDecoder(
        normal_net(config), CheckpointMetadata(kind="student", config=config, space="flux"), name="prompted"
    )


@pytest.fixture
def latent() -> Latent:
    return Latent(torch.randn(1, 128, 1, 2, generator=torch.Generator().manual_seed(1)), "flux2")


def test_a_latent_becomes_a_image_sixty_four_times_its_grid(decoder: PixelDecoder, latent: Latent) -> None:
    image = decoder.decode(latent, seed=3).image
    assert image.size == (128, 64)
    pixels = decoder.decode(latent, seed=3).tensor
    assert pixels.dtype == torch.float32
    assert pixels.shape == (1, 3, 64, 128)
    assert pixels.abs().max() <= 1


def test_a_list_of_images_is_what_a_loop_makes(decoder: PixelDecoder, tmp_path: Path) -> None:
    images = [Image.new("RGB", (40, 30), "teal"), Image.new("RGBA", (16, 33), (9, 99, 200, 128))]
    seen: list[Progress] = []
    output = decoder.upscale(images, seed=[4, 9], num_steps=1, progress_callback=seen.append)
    assert [image.size for image in output.images] == [(160, 120), (64, 132)]
    assert [image.mode for image in output.images] == ["RGB", "RGBA"]
    assert repr(output) == "DecodeOutput(2 images, 160x120, 64x132)"
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    for index, (image, seed) in enumerate(zip(images, (4, 9), strict=True)):
        alone = decoder.upscale(image, seed=seed, num_steps=1)
        assert torch.equal(output.tensors[index], alone.tensor[0])
        assert output.metadata[index] == alone.metadata[0]
    paths = output.save(tmp_path / "a.png")
    assert [path.name for path in paths] == ["a-1.png", "a-2.png"]
    assert [(read_metadata(path) or {})["seed"] for path in paths] == [4, 9]
    with pytest.raises(SizeError, match=r"differ in size.*use \.tensors"):
        _ = output.tensor


def test_a_bad_element_of_a_list_is_named_by_its_index(decoder: PixelDecoder, latent: Latent, tmp_path: Path) -> None:
    good = Image.new("RGB", (32, 32))
    with pytest.raises(ImageError, match=r"Element 1 of the list: .*none\.png does not exist"):
        decoder.upscale([good, tmp_path / "none.png"])
    with pytest.raises(ImageError, match="Element 0 of the list: It is a batch of 2 images"):
        decoder.upscale([torch.rand(2, 3, 16, 16) - 0.5, good])
    with pytest.raises(LatentError, match="Element 1 of the list: decode takes a Latent; got int"):
        decoder.decode([latent, 3])  # type: ignore[list-item]
    with pytest.raises(SettingError, match="seed has 3 values for 2 images"):
        decoder.upscale([good, good], seed=[1, 2, 3])
    with pytest.raises(SettingError, match="The list is empty"):
        decoder.upscale([])
    assert len(decoder.encode([good, np.zeros((32, 32, 3), np.uint8)])) == 2
    with pytest.raises(LatentError, match=r"share their grid: \(2, 2\) and \(2, 3\)"):
        decoder.encode([good, Image.new("RGB", (48, 32))])


def test_open_files_and_names(decoder: PixelDecoder, latent: Latent, tmp_path: Path) -> None:
    latent.save(tmp_path / "a.safetensors")
    with (tmp_path / "a.safetensors").open("rb") as file:
        assert torch.equal(Latent.load(file).tensor, latent.tensor)
    with pytest.raises(SettingError, match=r"got BytesIO.*encode_image\("):
        decoder.decode(latent, num_steps=1).save(io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(LatentError, match=r"got str.*Latent\.load\(path\).*upscale\(\)"):
        decoder.decode("photo.jpg")  # type: ignore[arg-type]


def test_numpy_numbers_are_numbers(decoder: PixelDecoder, latent: Latent, tmp_path: Path) -> None:
    assert decoder.decode(latent, seed=[np.int64(3)], sigma=np.float32(0.5), num_steps=1).metadata[0]["seed"] == 3
    made = decoder.decode(latent, seed=np.int64(5), num_steps=np.int32(1), sigma=torch.tensor(0.25))
    assert torch.equal(made.tensor, decoder.decode(latent, seed=5, num_steps=1, sigma=0.25).tensor)
    assert (read_metadata(made.save(tmp_path / "a.png")[0]) or {})["seed"] == 5


def test_the_same_seed_gives_the_same_image_and_another_another(decoder: PixelDecoder, latent: Latent) -> None:
    first, again, other = (decoder.decode(latent, seed=seed).tensor for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_equals_its_members(decoder: PixelDecoder) -> None:
    batch = Latent(torch.randn(3, 128, 1, 1), "flux2", torch.tensor([0.0, 0.2, 0.4]))
    together = decoder.decode(batch, seed=[4, 9, 2]).tensor
    for index, seed in enumerate((4, 9, 2)):
        alone = decoder.decode(batch[index], seed=seed).tensor
        assert torch.allclose(together[index], alone[0], atol=1e-5)
    images = decoder.decode(batch, seed=10).images
    assert [image.info["pidecode"]["seed"] for image in images] == [10, 11, 12]


def test_the_recipe_travels_with_the_file(decoder: PixelDecoder, latent: Latent, tmp_path: Path) -> None:
    decoder.decode(latent, seed=8, num_steps=2, sampler="ode").save(tmp_path / "made.png")
    recipe = read_metadata(tmp_path / "made.png")
    assert recipe is not None
    assert {"seed": 8, "num_steps": 2, "sampler": "ode", "space": "flux2", "model": "small"}.items() <= recipe.items()
    assert (recipe["width"], recipe["height"]) == (128, 64)
    json.dumps(recipe)


@pytest.mark.parametrize(("size", "expected"), [((32, 16), (32, 16)), ((37, 50), (37, 50)), ((5, 3), (5, 3))])
def test_upscaling_returns_exactly_four_times_the_image(
    decoder: PixelDecoder, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = decoder.upscale(Image.new("RGB", size, "teal")).image
    assert image.size == (4 * expected[0], 4 * expected[1])


def test_cropping_is_stated_and_exact(decoder: PixelDecoder) -> None:
    image = decoder.upscale(Image.new("RGB", (37, 50)), fit="crop").image
    assert image.size == (4 * 32, 4 * 48)
    assert decoder.encode(Image.new("RGB", (37, 50)), fit="crop").grid == (3, 2)


def test_strength_noises_and_labels(decoder: PixelDecoder, latent: Latent) -> None:
    plain = decoder.decode(latent).tensor
    strong = decoder.decode(latent, sigma=0.5).tensor
    assert not torch.equal(plain, strong)
    assert torch.equal(plain, decoder.decode(latent, sigma=0.0).tensor)
    with pytest.raises(SettingError, match=r"sigma is 0.9; .* 0.8"):
        decoder.decode(latent, sigma=0.9)


def test_progress_and_cancelling(decoder: PixelDecoder, latent: Latent) -> None:
    seen: list[int] = []

    def stop(step: Step) -> None:
        seen.append(step.index)
        if step.index == 3:
            raise Cancelled("Stopped by the caller.")

    with pytest.raises(Cancelled):
        decoder.decode(latent, callback=stop)
    assert seen == [1, 2, 3]


def test_a_prompted_network_takes_states_and_refuses_to_guess(prompted: PixelDecoder) -> None:
    latent = Latent(torch.randn(2, 16, 2, 2), "flux")
    states = torch.randn(1, 10, 16)
    one = prompted.decode(latent, prompt_embeds=states).tensor
    other = prompted.decode(latent, prompt_embeds=states + 1).tensor
    assert not torch.equal(one, other)
    with pytest.raises(SettingError, match="no text encoder here.*pidecode pull flux"):
        prompted.decode(latent, prompt="a cat")


def test_a_teacher_runs_with_guidance() -> None:
    config = debug_config()
    teacher = PixelDecoder(
        normal_net(config), CheckpointMetadata(kind="teacher", config=config, space="flux"), name="teacher"
    )
    latent = Latent(torch.randn(1, 16, 2, 2), "flux")
    states = torch.randn(1, 10, 16)
    plain = teacher.decode(latent, prompt_embeds=states, guidance_scale=1.0, num_steps=3).tensor
    assert plain.shape == (1, 3, 64, 64)
    with pytest.raises(SettingError, match="sampler acts on student decoders only"):
        teacher.decode(latent, prompt_embeds=states, sampler="sde")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_steps": 5}, SettingError, "steps is 5"),
        ({"guidance_scale": 3.0}, SettingError, "guidance_scale acts on teacher decoders only"),
        ({"prompt": "a cat"}, SettingError, "no text stream"),
        ({"prompt_embeds": torch.zeros(1, 10, 16)}, SettingError, "no text stream"),
        ({"size": (100, 64)}, SizeError, "nearest size that does is 96x64"),
        ({"size": (64, 512)}, SizeError, "more than twofold"),
        ({"seed": -1}, SettingError, "seed is -1; it must be from 0 to"),
        ({"seed": 2**64}, SettingError, "it must be from 0 to"),
        ({"num_steps": 2.5}, SettingError, "num_steps is 2.5; it must be a whole number"),
        ({"sampler": "euler"}, SettingError, "must be one of sde, ode"),
        ({"size": (10**5000, 64)}, SettingError, "size is"),
        ({"fit": "pad"}, TypeError, "fit"),
        ({"seed": [1, 2]}, SettingError, "2 seeds for 1 images"),
    ],
)
def test_settings_that_cannot_act_are_refused(
    decoder: PixelDecoder, latent: Latent, settings: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        decoder.decode(latent, **settings)  # type: ignore[arg-type]


def test_a_latent_of_another_space_or_no_type_is_refused(decoder: PixelDecoder) -> None:
    with pytest.raises(LatentError, match="decoder is for space flux2; the latent is of space flux"):
        decoder.decode(Latent(torch.randn(1, 16, 2, 2), "flux"))
    with pytest.raises(LatentError, match="decode takes a Latent; got Tensor"):
        decoder.decode(torch.zeros(1, 128, 1, 1))  # type: ignore[arg-type]


def test_a_decoder_without_encoder_says_so(decoder: PixelDecoder) -> None:
    decoder.encoder = None
    with pytest.raises(SettingError, match="came without an encoder"):
        decoder.upscale(Image.new("RGB", (32, 32)))


def test_weights_gone_wrong_are_noticed(decoder: PixelDecoder, latent: Latent) -> None:
    decoder.net.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(LatentError, match="NaN or infinite"):
        decoder.decode(latent)


def test_a_file_of_ours_loads_with_no_further_argument(tmp_path: Path, decoder: PixelDecoder, latent: Latent) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(dict(decoder.net.state_dict()), path, metadata=decoder.metadata.to_metadata())
    loaded = PixelDecoder.from_pretrained(path, device="cpu", dtype=torch.float32)
    assert loaded.space.name == "flux2"
    # Tensors in a file's own pages may be aligned otherwise, which changes the order of sums.
    assert torch.allclose(loaded.decode(latent).tensor, decoder.decode(latent).tensor, atol=1e-5)
    half = PixelDecoder.from_pretrained(path, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_an_adapter_changes_the_image_at_a_strength_and_can_be_taken_back(
    tmp_path: Path, decoder: PixelDecoder, latent: Latent
) -> None:
    layer = "patch_blocks.0.mlp_x.w1"
    out_width, in_width = decoder.net.patch_blocks[0].mlp_x.w1.weight.shape
    halves = {f"{layer}.lora_A.weight": torch.randn(2, in_width), f"{layer}.lora_B.weight": torch.randn(out_width, 2)}
    save_file(decoder.net.state_dict(), tmp_path / "base.safetensors", metadata=decoder.metadata.to_metadata())
    save_file(halves, tmp_path / "style.safetensors")
    loaded = PixelDecoder.from_pretrained(tmp_path / "base.safetensors", device="cpu", dtype=torch.float32)
    plain = loaded.decode(latent).tensor
    loaded.load_lora(tmp_path / "style.safetensors", 0.5)
    changed = loaded.decode(latent).tensor
    assert (changed - plain).abs().max() > 1e-3
    loaded.load_lora(tmp_path / "style.safetensors", -0.5)
    assert torch.allclose(loaded.decode(latent).tensor, plain, atol=1e-4)
    untouched = PixelDecoder.from_pretrained(tmp_path / "base.safetensors", device="cpu", dtype=torch.float32)
    assert torch.allclose(untouched.decode(latent).tensor, plain, atol=1e-5)


def test_a_decoder_of_the_wrong_space_is_refused_when_loaded(tmp_path: Path, decoder: PixelDecoder) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(dict(decoder.net.state_dict()), path, metadata=decoder.metadata.to_metadata())
    with pytest.raises((SettingError, CheckpointError), match="flux2"):
        PixelDecoder.from_pretrained(path, space="sd3", device="cpu")
    backbone = replace(decoder.metadata, kind="backbone", space=None)
    with pytest.raises(SettingError, match="a decoder is feed-forward, a student or a teacher"):
        PixelDecoder(decoder.net, backbone)


def test_a_device_that_is_not_here_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SettingError, match="'cuda' cannot be used here.*pidecode doctor"):
        PixelDecoder.from_pretrained("tiny", device="cuda")


def test_upscaling_refuses_a_prompt_that_cannot_act(decoder: PixelDecoder) -> None:
    with pytest.raises(SettingError, match="no text stream, so a prompt cannot act"):
        decoder.upscale(Image.new("RGB", (16, 16)), prompt="a cat")


def test_progress_tells_the_phase_and_never_falls() -> None:
    seen: list[Progress] = []
    small = torch.full((1, 3, 32, 32), -1.0)
    PixelDecoder.from_pretrained("tiny", device="cpu").upscale(small, progress_callback=seen.append)
    assert [str(progress) for progress in seen] == ["encoding", "decoding", "finishing"]
    shares = [progress.done for progress in seen]
    assert (shares[0], shares) == (0.0, sorted(shares))
    assert 0.9 < shares[-1] < 1


def test_steps_report_progress_before_they_begin(decoder: PixelDecoder, latent: Latent) -> None:
    seen: list[str] = []
    decoder.decode(latent, num_steps=2, progress_callback=lambda progress: seen.append(str(progress)))
    assert seen == ["decoding, step 1 of 2", "decoding, step 2 of 2", "finishing"]
