# SPDX-License-Identifier: Apache-2.0
"""Training data: folders and shards, sizes, order, crops, caches, and files that are damaged."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pidecode.errors import SettingError, TrainingError
from pidecode.training.config import TrainConfig, apply_settings
from pidecode.training.dataloader import ConditionEncoders, DataLoader
from pidecode.training.dataset import BucketSampler, find_images, nearest_size
from pidecode.training.distributed import DistEnv
from pidecode.training.latent_cache import LatentShards
from pidecode.training.recipes import BLOCK_DCT, RECIPES, encode_block_dct, get_recipe

CPU = torch.device("cpu")


def image_bytes(seed: int, size: tuple[int, int], kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    (place / "more").mkdir(parents=True)
    (place / "a.png").write_bytes(image_bytes(1, (96, 64)))
    (place / "a.txt").write_text("a wide one\n")
    (place / "more" / "b.jpg").write_bytes(image_bytes(2, (64, 96), "JPEG"))
    (place / "more" / "b.json").write_text(json.dumps({"caption": "a tall one"}))
    (place / "c.webp").write_bytes(image_bytes(3, (64, 64), "WEBP"))
    (place / "notes.md").write_text("no image")
    return place


def test_names_that_are_no_utf_8(folder: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    odd.write_bytes(image_bytes(4, (64, 64)))
    with tarfile.open(folder / "shard.tar", "w", format=tarfile.GNU_FORMAT) as shard:
        shard.add(odd, os.fsdecode(b"in/\xfe.png"))
    odd.with_name(os.fsdecode(b"bad\xff.png")).write_bytes(b"no image")
    found = find_images(folder)
    names = [*(entry.name for entry in found.entries), *found.skipped]
    assert names == ["a.png", "c.webp", "more/b.jpg", "shard.tar/in/\\xfe", "\\xff.png", "bad\\xff.png"]
    assert "\n".join(names).encode()
    assert len(found.fingerprint) == 16


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def recipe_for(source: Path, *settings: str) -> TrainConfig:
    return apply_settings(get_recipe("debug_teacher"), [f"data.source={str(source)!r}", *settings])


def loader_for(recipe: TrainConfig, cache: LatentShards | None = None, rank: int = 0, ranks: int = 1) -> DataLoader:
    encoders = ConditionEncoders(encode_block_dct, recipe.encode_text, cache)
    return DataLoader(recipe, find_images(recipe.data.source), encoders, DistEnv(CPU, rank, ranks))


def test_a_folder_is_read_with_its_captions(folder: Path) -> None:
    found = find_images(folder)
    assert [(e.name, e.height, e.width, e.read_caption()) for e in found.entries] == [
        ("a.png", 64, 96, "a wide one"),
        ("c.webp", 64, 64, ""),
        ("more/b.jpg", 96, 64, "a tall one"),
    ]
    assert found.skipped == {}


def test_shards_are_read_like_folders(tmp_path: Path) -> None:
    shard(
        tmp_path / "0.tar",
        {
            "x/001.jpg": image_bytes(1, (64, 64), "JPEG"), "x/001.txt": b"first",
            "x/002.png": image_bytes(2, (96, 64)), "x/002.json": b'{"caption": "second"}',
        },
    )  # fmt: skip
    found = find_images(tmp_path)
    assert [(e.name, e.read_caption()) for e in found.entries] == [("0.tar/x/001", "first"), ("0.tar/x/002", "second")]
    assert Image.open(io.BytesIO(found.entries[1].image.read())).size == (96, 64)


def test_a_cut_off_shard_gives_what_is_whole_and_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "cut.tar", {f"{i}.png": image_bytes(i, (64, 64)) for i in range(3)})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    found = find_images(tmp_path)
    assert 1 <= len(found.entries) < 3
    assert found.skipped


def test_images_lie_on_their_side_as_their_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "turned.jpg", exif=exif)
    assert [(e.height, e.width) for e in find_images(tmp_path).entries] == [(96, 64)]


def test_damaged_files_are_skipped_counted_and_named(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"not an image")
    whole = image_bytes(9, (96, 64))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole, its pixels are not
    recipe = recipe_for(folder, "data.batch_size=3", "data.sizes=((64, 96), (64, 64), (96, 64))")
    loader = loader_for(recipe)
    for number in range(2 * loader.sampler.batches_per_epoch):
        batch, _, names = loader.batch(number)
        assert "cut.png" not in names
        assert torch.isfinite(batch.image).all()
    loader.close()
    assert set(loader.skipped) == {"broken.png", "cut.png"}


def test_no_image_at_all_is_a_clear_stop(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"holds no readable image"):
        find_images(tmp_path)
    with pytest.raises(TrainingError, match=r"set data\.source"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"1 files were skipped"):
        find_images(tmp_path)


def test_only_unreadable_pixels_is_a_clear_stop(tmp_path: Path) -> None:
    whole = image_bytes(9, (96, 64))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    loader = loader_for(recipe_for(tmp_path))
    with pytest.raises(TrainingError, match=r"in a row could not be read, the last being cut\.png"):
        loader.batch(0)
    loader.close()


def test_every_sitting_is_of_one_size_and_an_epoch_sees_everything(folder: Path) -> None:
    for index in range(7):
        (folder / f"wide{index}.png").write_bytes(image_bytes(index, (90, 60)))
    entries = find_images(folder).entries
    sizes = ((64, 64), (64, 96), (96, 64))
    order = BucketSampler(entries, sizes, 4, seed=5)
    epoch = [order.batch(number) for number in range(order.batches_per_epoch)]
    assert {index for batch in epoch for index in batch.entries} == set(range(len(entries)))
    for batch in epoch:
        assert all(nearest_size(entries[index], sizes) == batch.size for index in batch.entries)
        assert len(batch.entries) == 4
    again = BucketSampler(entries, sizes, 4, seed=5)
    assert again.batch(order.batches_per_epoch + 1) == order.batch(order.batches_per_epoch + 1)


def test_a_batch_is_the_same_whenever_and_by_however_many_it_is_asked_for(folder: Path) -> None:
    recipe = recipe_for(folder, "data.batch_size=2", "data.crop=32", "data.sizes=((64, 64),)")
    loader = loader_for(recipe)
    whole, rng, names = loader.batch(3)
    single = apply_settings(recipe, ["data.batch_size=1"])
    for rank in range(2):
        other = loader_for(single, rank=rank, ranks=2)
        part, part_draws, part_names = other.batch(3)
        other.close()
        assert part_names == names[rank : rank + 1]
        for field in ("image", "low", "latent", "sigma", "keep", "text"):
            assert torch.equal(getattr(part, field)[0], getattr(whole, field)[rank]), field
        assert torch.equal(part_draws.normal((2,))[0], rng.normal((2,))[rank]) or rank == 1
    loader.close()


def test_crops_of_image_and_latent_show_the_same_place(folder: Path) -> None:
    recipe = recipe_for(
        folder,
        "data.crop=32",
        "data.sizes=((96, 96),)",
        "noise.probability=0",
        "data.latent_dropout=0",
        "data.batch_size=3",
    )
    loader = loader_for(recipe)
    for number in range(4):
        batch, _, _ = loader.batch(number)
        assert batch.image.shape[-2:] == (32, 32)
        assert batch.low is not None and batch.latent is not None
        assert batch.low.shape[-2:] == (8, 8)
        # This encoder is local, so the latent of the crop is the crop of the latent.
        assert torch.allclose(batch.latent, encode_block_dct(batch.low), atol=1e-5)
    loader.close()


def test_latents_are_encoded_once_and_read_from_shards_afterwards(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(folder, "data.sizes=((64, 64),)", "data.batch_size=3")
    calls = []

    def encode(low: torch.Tensor) -> torch.Tensor:
        calls.append(len(low))
        return encode_block_dct(low)

    cache = LatentShards(tmp_path / "cache", "block-dct", per_shard=2)
    loader = DataLoader(recipe, find_images(folder), ConditionEncoders(encode, recipe.encode_text, cache), DistEnv(CPU))
    first, _, _ = loader.batch(0)
    loader.close()
    assert sum(calls) == 3
    again = LatentShards(tmp_path / "cache", "block-dct")
    assert len(again) == 3
    loader = DataLoader(recipe, find_images(folder), ConditionEncoders(None, recipe.encode_text, again), DistEnv(CPU))
    second, _, _ = loader.batch(0)
    loader.close()
    assert torch.equal(first.latent, second.latent)  # type: ignore[arg-type]
    assert len(LatentShards(tmp_path / "cache", "another encoder")) == 0


def test_damaged_latent_shards_are_passed_over(tmp_path: Path) -> None:
    cache = LatentShards(tmp_path, "x")
    cache.put("a", torch.ones(16, 2, 2))
    cache.flush()
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    again = LatentShards(tmp_path, "x")
    assert len(again) == 1
    assert torch.equal(again.get("a"), torch.ones(16, 2, 2))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"NaN or infinite values for b"):
        again.put("b", torch.full((16, 2, 2), float("nan")))


def test_an_encoder_of_another_space_is_noticed(folder: Path) -> None:
    recipe = recipe_for(folder)
    encoders = ConditionEncoders(lambda low: encode_block_dct(low)[:, :4], recipe.encode_text)
    loader = DataLoader(recipe, find_images(folder), encoders, DistEnv(CPU))
    with pytest.raises(TrainingError, match=r"gave latents of shape \(4, .*has \(16,"):
        loader.batch(0)
    loader.close()


def test_every_recipe_is_whole_and_every_setting_is_explained() -> None:
    from pidecode.training.config import describe

    for name in RECIPES:
        recipe = get_recipe(name)
        assert recipe.title
        assert [entry.name for entry in describe(recipe) if not entry.words] == []


@pytest.mark.parametrize("space", ["flux", "sd3", "sdxl", "flux2", "qwenimage", "dinov2", "siglip"])
def test_recipes_exist_for_every_latent_space(space: str) -> None:
    for name in ("teacher_adapter", "teacher", "student", "student_rollout", "teacher_lora", "student_lora"):
        recipe = get_recipe(name, space)
        assert recipe.space is not None
        assert recipe.space.name == space


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.batchsize=4", "Did you mean batch_size"),
        ("run.steps=1.5", "must be a whole number"),
        (f"run.seed={2**64}", "run.seed is 18446744073709551616; it must be at least 0 and below"),
        ("run.seed=-5", "run.seed is -5; it must be at least 0"),
        ("data.num_workers=1000000", "at most 256"),
        ("data.batch_size=1000000000000", "at most 65536"),
        ("run.precision=fp8", "'bfloat16' or 'float32'"),
        ("data=3", "is a group of settings"),
        ("run.steps.x=4", "goes too deep"),
        ("nothing", "write name=value"),
        ("data.sizes=((100, 100),)", "does not divide into units of 32"),
        ("data.crop=4096", "larger than images of"),
        ("noise.sigma_max=2", "must lie within 0 and 1"),
        ("distillation.times=(0.5, 0.7, 0)", "must decrease and end in 0"),
        ("trainable=adapter", ""),
    ],
)
def test_settings_that_cannot_act_are_refused(setting: str, message: str) -> None:
    recipe = get_recipe("debug_teacher")
    if not message:
        assert apply_settings(recipe, [setting]).trainable == "adapter"
        return
    with pytest.raises(SettingError, match=message.replace("(", r"\(")):
        apply_settings(recipe, [setting])


def test_settings_of_every_kind_are_read() -> None:
    recipe = apply_settings(
        get_recipe("debug_teacher"),
        ["data.batch_size=4", "run.trackers=tensorboard", "optimizer.lr=1", "run.activation_checkpointing=no",
         "teacher.shift_base_size=none",
         "data.sizes=[(64, 64)]", "title=a new name"],
    )  # fmt: skip
    assert (recipe.data.batch_size, recipe.run.trackers, recipe.optimizer.lr) == (4, ("tensorboard",), 1.0)
    assert (recipe.run.activation_checkpointing, recipe.teacher.shift_base_size, recipe.data.sizes) == (
        False,
        None,
        ((64, 64),),
    )
    assert recipe.title == "a new name"


def test_a_network_of_another_space_is_refused() -> None:
    with pytest.raises(SettingError, match=r"reads latents of 16 channels at 1/8"):
        replace(get_recipe("debug_teacher"), space=replace(BLOCK_DCT, channels=4))


def test_folders_that_are_not_read_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert find_images(tmp_path).skipped == {"circle": "links to folders are not followed"}
