# SPDX-License-Identifier: Apache-2.0
"""`tiny`: decoder and encoder, strips against the whole, and what a feed-forward decoder refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import recorded
import tiny_models
from pidecode import PixelDecoder
from pidecode.cli.app import cli
from pidecode.encoders.base import load_encoder
from pidecode.engine import feed_forward
from pidecode.engine.feed_forward import FeedForwardPlan, FeedForwardRunner, plan_feed_forward, predict
from pidecode.engine.machine import Machine
from pidecode.engine.plan import plan_decode
from pidecode.errors import CheckpointError, DoesNotFitError, ImageError, LatentError, SettingError, SizeError
from pidecode.images import resize
from pidecode.latents.latent import Latent
from pidecode.models.tiny import TinyDecoder, TinyEncoder
from pidecode.options import DecodeOptions, RuntimeOptions
from pidecode.registry.configs import TinyDecoderConfig, TinyEncoderConfig

SMALL = TinyDecoderConfig(width=8, blocks=(1, 1, 1, 1), base_blocks=(1, 1, 1, 1))
SMALL_ENCODER = TinyEncoderConfig(
    full_width=4, half_width=4, half_blocks=1, quarter_width=4, quarter_blocks=1, eighth_width=8, eighth_blocks=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def shipped() -> PixelDecoder:
    return PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)


def latent(rows: int = 1, columns: int = 2, batch: int = 1) -> Latent:
    return Latent(recorded.noise(batch, 128, rows, columns, seed=0), "flux2", 0.0)


def test_the_shapes_are_those_named() -> None:
    assert (SMALL.pixels_per_cell, SMALL.pixel_shuffle) == (64, 4)
    assert TinyDecoder(SMALL)(torch.zeros(2, 128, 1, 3)).shape == (2, 3, 64, 192)
    assert TinyEncoder(SMALL_ENCODER)(torch.zeros(1, 3, 32, 48)).shape == (1, 128, 2, 3)
    assert TinyDecoderConfig.from_dict(SMALL.to_dict()) == SMALL
    assert TinyEncoderConfig.from_dict(SMALL_ENCODER.to_dict()) == SMALL_ENCODER


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": ()}, "blocks is empty"), ({"blocks": (10**9,)}, "blocks is 1000000000"),
        ({"width": 6}, "multiple of 4"), ({"blocks": (1,) * 8}, "do not divide the 64"),
        ({"width": True}, "width is True"), ({"max_sigma": 1.5}, "max_sigma is 1.5"),
        ({"base_blocks": (-1,)}, "base_blocks is -1"), ({"base_blocks": (1,) * 6}, "do not divide the 16"),
        ({"base_weight": 2.0}, "base_weight is 2"),
        ({"base_detail_weight": -1.0}, "base_detail_weight is -1"),
        ({"base_edge_weight": 1.5}, "base_edge_weight is 1.5"),
        ({"base_edge_gradient": 0.0}, "base_edge_gradient is 0.0; it must be finite and above 0"),
        ({"blocks": (1,) * 5, "base_blocks": (1,)}, "The 32 cells .* do not divide the 16 pixels"),
        ({"latent_down": 24, "base_blocks": (1,)}, "The 16 cells .* do not divide the 24 pixels"),
    ],
)  # fmt: skip
def test_decoder_shapes_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        TinyDecoderConfig(**changes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eighth_blocks": 10**9}, "from 1 to 256"),
        ({"channels": 6}, "multiple of 4"), ({"wide": 1}, "Unknown fields wide"),
    ],
)  # fmt: skip
def test_encoder_shapes_that_cannot_be_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        TinyEncoderConfig.from_dict(values)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LatentError, match=r"\[batch, 128, h, w\]"):
        TinyDecoder(SMALL)(torch.zeros(1, 16, 2, 2))
    with pytest.raises(SizeError, match="does not divide into 16-pixel cells"):
        TinyEncoder(SMALL_ENCODER)(torch.zeros(1, 3, 20, 32))


@pytest.mark.parametrize(
    ("blocks", "base_blocks"), [((1, 2, 0, 1), (1, 1, 1, 1)), ((1, 2, 0, 1), ()), ((2,), ()), ((1, 1), (2,))]
)
def test_strips_equal_the_whole(blocks: tuple[int, ...], base_blocks: tuple[int, ...]) -> None:
    # In float64, since float32 alone rounds by as much as the bound.
    net = tiny_models.shake(TinyDecoder(replace(SMALL, blocks=blocks, base_blocks=base_blocks))).double()
    tensor, calls = recorded.noise(2, 128, 9, 3, seed=1), []
    with torch.no_grad():
        whole = net(tensor).float()
    assert float(whole.std()) > 0.1
    for strip in (None, 2000, 1):
        plan = FeedForwardPlan(size=(192, 576), strip=strip)
        strips = FeedForwardRunner(net, plan).decode(tensor, lambda done, total: calls.append((done, total)))
        torch.testing.assert_close(strips, whole, rtol=1e-4, atol=1e-5)
        if base_blocks:
            low_res = recorded.noise(2, 3, 144, 48, seed=2)
            given = low_res.clone()
            strips = FeedForwardRunner(net, plan).decode(tensor, low_res=low_res)
            assert torch.equal(low_res, given)
            with torch.no_grad():
                torch.testing.assert_close(strips, net(tensor, low_res).float(), rtol=1e-4, atol=1e-5)
    if len(blocks) > 2:
        assert max(total for _, total in calls) > 8 and min(total for _, total in calls) > 1


def test_a_base_moves_low_frequencies_toward_its_image() -> None:
    net, tensor = tiny_models.shake(TinyDecoder(SMALL)), recorded.noise(1, 128, 2, 3, seed=1)
    distances = []
    for weight in (0.0, 0.5, 1.0):
        net.config = replace(SMALL, base_weight=weight, base_detail_weight=weight, base_edge_weight=weight)
        with torch.no_grad():
            image, low = net(tensor), net.base(tensor)
            uncorrected = net(tensor, low)
        distances.append(float((torch.nn.functional.avg_pool2d(image, 4) - low).abs().mean()))
        error = (image.mean((2, 3)) - low.mean((2, 3))).abs()  # mean colors are the base's, whatever the share
        assert bool((error < 0.1 * (uncorrected.mean((2, 3)) - low.mean((2, 3))).abs()).all())
    assert distances[1] == pytest.approx(0.5 * distances[0], rel=0.2)
    assert distances[2] < 0.3 * distances[0]


def test_the_finest_structure_of_the_base_has_a_weight_of_its_own() -> None:
    net, tensor = tiny_models.shake(TinyDecoder(SMALL)), recorded.noise(1, 128, 2, 3, seed=1)
    pool = torch.nn.functional.avg_pool2d
    with torch.no_grad():
        low = net.base(tensor)
        image = net(tensor, low)
        difference = low - pool(image, 4)
        corrections = {}
        for weight in (0.0, 0.25):
            net.config = replace(SMALL, base_weight=1.0, base_detail_weight=weight, base_edge_weight=weight)
            corrections[weight] = net.correction(image, low)
    fine = difference - torch.nn.functional.interpolate(pool(difference, 2), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(corrections[0.0], difference - fine)
    torch.testing.assert_close(corrections[0.25], difference - 0.75 * fine)
    old = TinyDecoderConfig.from_dict({"base_weight": 0.4})  # a file of before there was the weight
    assert (old.base_detail_weight, old.base_edge_weight) == (0.4, 0.4)


def test_edges_of_the_base_have_a_weight_of_their_own() -> None:
    net = TinyDecoder(replace(SMALL, base_weight=1.0, base_detail_weight=0.25, base_edge_weight=1.0))
    low = torch.zeros(1, 3, 32, 32)
    low[..., 15:] = 1.0
    low[..., :8] += 0.01 * recorded.noise(1, 3, 32, 8, seed=1)  # texture of one step of 255
    image = torch.zeros(1, 3, 128, 128)
    coarse = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(low, 2), scale_factor=2, mode="bilinear")
    edge = 127.5 / 2 * (2 / 3) ** 0.5  # gradient of the two columns at the edge, root mean square of three columns
    for gradient, share in ((edge, 0.625), (edge / 3, 0.25 + 0.75 * 81 / 82)):
        net.config = replace(net.config, base_edge_gradient=gradient)
        shares = (net.correction(image, low) - coarse) / (low - coarse)
        assert float((shares[..., 14:16] - share).abs().max()) < 0.002
        assert float((shares[..., :6] - 0.25).abs().max()) < 0.02
    old = TinyDecoderConfig.from_dict({"base_weight": 1.0, "base_detail_weight": 0.07})  # of before there were three
    assert old.base_edge_weight == 0.07


def test_the_decoder_reads_the_low_resolution_image_in_every_stage_but_the_first() -> None:
    assert not any(parameter.detach().any() for parameter in TinyDecoder(SMALL).low_res_inputs.parameters())
    net, tensor = tiny_models.shake(TinyDecoder(SMALL)), recorded.noise(1, 128, 2, 3, seed=1)
    low_res = recorded.noise(1, 3, 32, 48, seed=2)
    assert [tuple(conv.weight.shape[:2]) for conv in net.low_res_inputs] == [(8, 48), (8, 12), (8, 3)]
    with torch.no_grad():
        estimate = net.base(tensor)
        torch.testing.assert_close(net(tensor), net.corrected(net(tensor, estimate), estimate), rtol=0, atol=0)
        before = net(tensor, low_res)
        for conv in net.low_res_inputs:
            weight = conv.weight.clone()
            conv.weight.zero_()
            assert float((net(tensor, low_res) - before).abs().mean()) > 1e-3
            conv.weight.copy_(weight)
        half = net.bfloat16()(tensor, low_res)
        assert half.dtype is torch.bfloat16 and float((half.float() - before).abs().mean()) < 0.05 * float(before.std())
        strips = FeedForwardRunner(net).decode(tensor, low_res=low_res)
        assert strips.dtype is torch.float32 and float((strips - half).abs().mean()) < 0.02 * float(before.std())
    bare = TinyDecoder(replace(SMALL, base_blocks=()))
    assert not bare.low_res_inputs
    with torch.no_grad():
        torch.testing.assert_close(bare(tensor, low_res), bare(tensor), rtol=0, atol=0)


def test_a_low_resolution_image_that_is_known_takes_the_place_of_the_base(
    shipped: PixelDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(shipped.runner, FeedForwardRunner) and shipped.runner.base is not None
    calls, decode = [], shipped.runner.base.decode
    monkeypatch.setattr(shipped.runner.base, "decode", lambda tensor: calls.append(tensor) or decode(tensor))
    image, reference = torch.full((1, 3, 32, 32), -0.5), torch.full((1, 3, 16, 32), -0.5)
    shipped.upscale(image)
    shipped.decode(latent(), reference=reference, color_fix="back-projection")
    assert not calls
    shipped.decode(latent())
    shipped.upscale(image, color_fix="off")  # all is left to the latent
    shipped.upscale(image, sigma=0.2)
    shipped.decode(latent(), reference=reference, color_fix="coarse")
    shipped.decode(latent(), reference=torch.full((1, 3, 32, 64), -0.5), color_fix="back-projection")  # another size
    assert len(calls) == 5


def test_a_plan_for_an_accelerator_is_cut_where_the_whole_does_not_fit() -> None:
    full = TinyDecoderConfig()
    roomy = plan_feed_forward(full, (2048, 2048), Machine(memory=10**12))
    tight = plan_feed_forward(full, (2048, 2048), Machine(memory=roomy.peak - 1))
    assert roomy.strip is None and tight.strip in feed_forward.STRIPS
    assert tight.peak < roomy.peak
    on_cpu = plan_feed_forward(full, (2048, 2048), Machine(memory=10**12, accelerator=False))
    assert on_cpu.strip == feed_forward.CPU_STRIP == FeedForwardRunner(TinyDecoder(SMALL)).strip
    with pytest.raises(DoesNotFitError, match="needs .* at the least"):
        plan_decode(SMALL, (4096, 4096), Machine(memory=1000, accelerator=False))
    with pytest.raises(SettingError, match="multiple of the 64 pixels"):
        plan_decode(SMALL, (1000, 1024), Machine(memory=10**12, accelerator=False))
    with pytest.raises(SettingError, match="Eight-bit weights act on"):
        plan_decode(SMALL, (1024, 1024), Machine(memory=10**12), quantization="int8")


def test_a_prediction_counts_the_weights(shipped: PixelDecoder) -> None:
    assert isinstance(shipped.net, TinyDecoder)
    held = sum(parameter.numel() * 4 for parameter in shipped.net.parameters())
    plan = predict(FeedForwardPlan(size=(1024, 1024), strip=feed_forward.CPU_STRIP), shipped.net.config)
    assert dict(plan.parts)["weights"] == held
    assert shipped.runner.plan_for((1024, 1024), 1).working == plan.working
    assert shipped.memory_estimate((1024, 1024)) > plan.peak  # the process itself is counted


MEASURE = """
import sys, torch, pidecode
from pathlib import Path
width, height, dtype, color_fix = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
decoder = pidecode.PixelDecoder.from_pretrained("tiny", device="cpu", dtype=dtype)
image = torch.rand(1, 3, height, width) * 2 - 1
print(decoder.memory_estimate((width * decoder.scale, height * decoder.scale)))
decoder.upscale(image, color_fix=color_fix)
print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("size", "dtype", "color_fix"),
    [
        ((64, 64), "float32", "back-projection"), ((256, 256), "float32", "back-projection"),
        ((256, 256), "bfloat16", "back-projection"), ((256, 256), "float32", "off"),
        ((512, 512), "float32", "back-projection"), ((512, 512), "bfloat16", "back-projection"),
        ((512, 512), "float32", "off"), ((512, 512), "bfloat16", "off"),
        ((1024, 1024), "bfloat16", "back-projection"), ((768, 512), "float32", "fine"),
    ],
)  # fmt: skip
def test_the_predicted_peak_is_within_a_tenth_of_the_resident_memory(
    size: tuple[int, int], dtype: str, color_fix: str
) -> None:
    arguments = [str(side) for side in size] + [dtype, color_fix]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    predicted, measured = map(int, done.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.1)


def test_what_does_not_fit_is_refused_before_it_is_begun(
    shipped: PixelDecoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pidecode.engine.runner.free_memory", lambda device: 10**6)
    monkeypatch.setattr(TinyDecoder, "coarse", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(DoesNotFitError, match=r"256x256 pixels needs about .* and 1\.0 MB are free"):
        shipped.upscale(torch.full((1, 3, 64, 64), -1.0))
    with pytest.raises(DoesNotFitError, match="256x256"):
        shipped.decode(Latent(torch.zeros(1, 128, 4, 4), "flux2", 0.0))
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    done = CliRunner().invoke(cli, ["upscale", str(tmp_path / "small.png")])
    assert done.exit_code == DoesNotFitError.exit_code and "256x256 pixels needs" in done.output


@pytest.mark.parametrize(
    "option",
    [{"seed": 1}, {"num_steps": 4}, {"sampler": "sde"}, {"guidance_scale": 2.0}, {"shift": 2.0},
     {"prompt": "a cat"}, {"negative_prompt": "a dog"}, {"prompt_embeds": torch.zeros(1, 2, 4)}],
)  # fmt: skip
def test_what_cannot_act_is_refused(shipped: PixelDecoder, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(SettingError, match=f"{name} acts on .* only, and tiny is a feed-forward decoder"):
        shipped.decode(latent(), **option)
    with pytest.raises(SettingError, match=f"{name} acts on"):
        shipped.decode(latent(), options=DecodeOptions(**option))


def test_a_smaller_size_is_downsampled_and_a_larger_refused(shipped: PixelDecoder) -> None:
    whole, small = shipped.decode(latent()), shipped.decode(latent(), size=(32, None))
    assert small.image.size == (32, 16)
    assert small.metadata[0]["downsampled_from"] == [128, 64]
    assert float((small.tensor - resize(whole.tensor, 16, 32, method="area")).abs().mean()) < 0.05
    source = torch.rand(1, 3, 20, 36) * 2 - 1
    assert shipped.upscale(source, scale=2).image.size == (72, 40)
    assert shipped.upscale(source, size=(None, 30)).image.size == (54, 30)
    assert shipped.upscale(source, options=DecodeOptions(scale=1)).metadata[0]["width"] == 36
    for given, words in (
        ({"size": (256, None)}, "makes 128x64 of this"), ({"size": (64, 64)}, "give one side alone, or 64x32"),
    ):  # fmt: skip
        with pytest.raises(SizeError, match=words):
            shipped.decode(latent(), **given)
    with pytest.raises(SizeError, match="scale is 6, and tiny enlarges 4 times"):
        shipped.upscale(source, scale=6)
    with pytest.raises(SettingError, match="give one"):
        shipped.upscale(source, scale=2, size=(40, 40))


def test_adapters_and_ways_to_run_are_refused(shipped: PixelDecoder, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Adapters act on student and teacher decoders only"):
        shipped.load_lora(tmp_path / "adapter.safetensors")
    with pytest.raises(SettingError, match="knows neither eight-bit weights"):
        PixelDecoder.from_pretrained("tiny", device="cpu", runtime=RuntimeOptions(compile=True))


def test_the_image_says_feed_forward_and_nothing_that_did_not_act(shipped: PixelDecoder) -> None:
    output = shipped.decode(latent(batch=2))
    assert (shipped.kind, shipped.reads_text, shipped.license) == ("feed-forward", False, "Apache-2.0")
    assert "feed-forward" in repr(shipped)
    for metadata in output.metadata:
        assert metadata["kind"] == "feed-forward"
        assert not {"seed", "num_steps", "sampler", "guidance_scale", "prompt"} & set(metadata)
    assert [image.size for image in output.images] == [(128, 64)] * 2
    with pytest.raises(SettingError, match="There are 2 images"):
        output.image  # noqa: B018


def test_steps_are_reported_and_the_image_is_the_one_returned(shipped: PixelDecoder) -> None:
    seen = []
    output = shipped.decode(latent(), callback=seen.append)
    assert [(step.index, step.total) for step in seen] == [(1, 1)]
    assert torch.equal(seen[0].image.clamp(-1, 1), output.tensor)


def test_upscaling_reports_what_it_does(shipped: PixelDecoder) -> None:
    seen: list[str] = []
    shipped.upscale(
        recorded.synthetic_image(32, 32, seed=3), progress_callback=lambda progress: seen.append(str(progress))
    )
    assert seen == ["encoding", "decoding", "finishing"]


def test_packed_channels_are_channel_row_column() -> None:
    encoder = tiny_models.shake(TinyEncoder(SMALL_ENCODER))
    image, found = torch.rand(1, 3, 32, 32), []
    with torch.no_grad():
        packed = encoder(image)
        encoder.head.register_forward_hook(lambda module, args, output: found.append(output))
        encoder(image)
    (cells,) = found
    assert torch.equal(packed[:, 4 * 5 + 2 * 1 + 0], cells[:, 5, 1::2, 0::2])


def test_the_encoder_loads_as_that_of_its_space(tmp_path: Path) -> None:
    model, path = tiny_models.shake(TinyEncoder(SMALL_ENCODER)), tmp_path / "tiny_encoder.safetensors"
    note = {"format": 1, "kind": "encoder", "space": "flux2", "config": SMALL_ENCODER.to_dict()}
    save_file(dict(model.state_dict()), path, {"pidecode": json.dumps(note)})
    encoder = load_encoder("flux2", path)
    image = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encoder(image), model(image))
    assert not encoder.can_decode
    with pytest.raises(CheckpointError, match="into space flux2, not sdxl"):
        load_encoder("sdxl", path)


def test_a_file_of_ones_own_loads_and_a_wrong_one_is_refused(tmp_path: Path, shipped: PixelDecoder) -> None:
    torch.manual_seed(0)
    net, path = TinyDecoder(SMALL), tmp_path / "own.safetensors"
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(tensors, path, replace(shipped.metadata, config=SMALL).to_metadata())
    own = PixelDecoder.from_pretrained(path, device="cpu", dtype=torch.float32)
    expected = FeedForwardRunner(net).decode(latent().tensor).clamp(-1, 1)
    torch.testing.assert_close(own.decode(latent()).tensor, expected, atol=0, rtol=0)
    short = {name: value for name, value in tensors.items() if name != "to_pixels.bias"}
    save_file(short, path, replace(shipped.metadata, config=SMALL).to_metadata())
    with pytest.raises(CheckpointError, match=r"missing: to_pixels\.bias"):
        PixelDecoder.from_pretrained(path, device="cpu")


def test_both_files_fit_their_share_of_the_package(root: Path) -> None:
    assets = root / "src" / "pidecode" / "assets"
    assert sum((assets / name).stat().st_size for name in ("tiny.safetensors", "tiny_encoder.safetensors")) < 32e6


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"config": {"full_blocks": 10**9}}, "full_blocks is 1000000000"),
        ({"config": {"full_blocks": True}}, "full_blocks is True"),
        ({"config": {"unknown": 1}}, "Unknown fields unknown"),
        ({"config": [1]}, "no JSON object"),
        ({"config": {}, "space": "flux"}, "not flux2"),
    ],
)
def test_an_encoder_with_hostile_metadata_is_refused(tmp_path: Path, metadata: dict[str, Any], said: str) -> None:
    path = tmp_path / "encoder.safetensors"
    record = {"format": 1, "kind": "encoder", "space": "flux2", **metadata}
    save_file({"a": torch.zeros(1)}, path, {"pidecode": json.dumps(record)})
    with pytest.raises(CheckpointError, match=said):
        load_encoder("flux2", path)


def test_a_reference_that_is_not_finite_is_refused(shipped: PixelDecoder) -> None:
    reference = torch.zeros(1, 3, 16, 32)
    reference[0, 0, 3, 3] = float("nan")
    with pytest.raises((ImageError, LatentError), match="NaN"):
        shipped.decode(latent(), color_fix="coarse", reference=reference)
    with pytest.raises((ImageError, LatentError), match="NaN"):
        shipped.decode(latent(), options=DecodeOptions(color_fix="back-projection", reference=reference))


def test_what_is_delivered_is_finite(shipped: PixelDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pidecode.color_fix.apply_color_fix", lambda images, *_, **__: images * float("nan"))
    with pytest.raises(LatentError, match="NaN"):
        shipped.decode(latent(), color_fix="coarse", reference=torch.full((1, 3, 16, 32), -1.0))


def test_noise_beyond_what_it_decodes_well_is_refused(shipped: PixelDecoder) -> None:
    assert shipped.max_sigma == 0.4
    with pytest.raises(SettingError, match="tiny decodes latents well up to 0.4") as refused:
        shipped.decode(latent(), sigma=0.45)
    for interface in ("cli", "http"):
        assert refused.value.message(interface) == str(refused.value)
    assert str(refused.value).endswith("up to 0.4. Add less noise.")
    with pytest.raises(SettingError, match="noise level is 0.45; tiny decodes latents well up to 0.4. Let the"):
        shipped.decode(replace(latent(), sigma=0.45))


def test_a_noisy_latent_is_decoded_at_the_scale_of_its_signal(shipped: PixelDecoder) -> None:
    clean = latent()
    faint = replace(clean, tensor=clean.tensor * 0.75, sigma=0.25)  # noise of 0, so that only the scale differs
    torch.testing.assert_close(shipped.decode(faint).tensors, shipped.decode(clean).tensors, atol=1e-4, rtol=0)
