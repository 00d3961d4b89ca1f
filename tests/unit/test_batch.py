# SPDX-License-Identifier: Apache-2.0
"""Batches on one device: jobs, skipped and failed jobs, and the report."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from pidecode import PixelDecoder
from pidecode.batch.jobs import IMAGE_SUFFIXES, BatchJob, OutputNaming, collect_jobs
from pidecode.batch.report import BatchReport, JobResult, merge
from pidecode.batch.run import Batch, choose_engine, run_batch
from pidecode.batch.worker import Worker, WorkerConfig
from pidecode.cli.app import cli
from pidecode.errors import FileError, SettingError
from pidecode.files import FolderLock, remove_partial
from pidecode.images import frames_in, read, read_metadata, save_image
from pidecode.latents.latent import Latent
from pidecode.options import DecodeOptions
from pidecode.registry.configs import debug_config
from random_networks import save_student

FLUX2 = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random network in the release's file format."""
    return save_student(FLUX2, tmp_path_factory.mktemp("model") / "small.safetensors", space="flux2")


@pytest.fixture
def config(model: Path) -> WorkerConfig:
    return WorkerConfig(model=str(model), device="cpu", options=DecodeOptions(num_steps=1))


def put(path: Path, count: int = 1, seed: int = 0) -> Path:
    """Write a file of `count` small latents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(count, 128, 1, 1, generator=torch.Generator().manual_seed(seed))
    Latent(noise, "flux2").save(path, overwrite=True)
    return path


def go(source: Path | str, out: Path, config: WorkerConfig, **naming: Any) -> BatchReport:
    jobs = collect_jobs(source, OutputNaming(out=out, **naming))
    batch = Batch(jobs=jobs, config=config, out=out, left_out=jobs.left_out)
    report = run_batch(batch, lambda _: None)
    assert report is not None
    return report


def states(report: BatchReport) -> dict[str, str]:
    return {result.name: result.state for result in report.results}


def test_a_folder_keeps_its_structure_and_other_files_are_ignored(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/c.safetensors", "a/.hidden.png", "notes.txt", "out/old.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    jobs = collect_jobs(tmp_path, OutputNaming(out=tmp_path / "out"))
    assert [(job.name, job.kind, job.out.relative_to(tmp_path).as_posix()) for job in jobs] == [
        ("a/c.safetensors", "latent", "out/a/c.png"),
        ("b.jpg", "image", "out/b.png"),
    ]


def test_a_pattern_and_a_single_file(tmp_path: Path) -> None:
    for name in ("in/x/1.png", "in/y/2.png", "in/y/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    jobs = collect_jobs(f"{tmp_path}/in/**/*.png", OutputNaming(out=tmp_path / "o", suffix=".webp"))
    assert [job.out.relative_to(tmp_path).as_posix() for job in jobs] == ["o/x/1.webp", "o/y/2.webp"]
    (job,) = collect_jobs(tmp_path / "in/y/3.jpg", OutputNaming(out=tmp_path / "o", keep_suffix=True))
    assert job.out == tmp_path / "o" / "3.jpg.png"


def test_a_manifest_gives_each_line_its_own_settings(tmp_path: Path) -> None:
    lines = [
        {"source": "a.safetensors", "seed": 7, "size": [64, 128], "prompt": "a cat"},
        {"source": "/elsewhere/b.png", "out": "new/b.jpg"},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    first, second = collect_jobs(path, OutputNaming(out=tmp_path / "o"))
    assert first.source == tmp_path / "a.safetensors"
    assert first.options == {"seed": 7, "size": (64, 128), "prompt": "a cat"}
    assert second == BatchJob(
        name="/elsewhere/b.png", source=Path("/elsewhere/b.png"), kind="image", out=tmp_path / "o/new/b.jpg"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Line 1 of list.jsonl: It is not JSON"),
        ("[1]", 'is not a JSON object; write {"source": "cat.png"}'),
        ('{"sorce": "a.png"}', "an entry 'sorce'. Did you mean source"),
        ('{"seed": 1}', "needs 'source' as text"),
        ('{"source": "a.txt"}', "a.txt is neither an image"),
        ('{"source": "a.png", "seed": "x"}', "seed is 'x'; it must be a whole number"),
        ('{"source": "a.png", "seed": true}', "seed is True"),
        ('{"source": "a.png", "size": [1]}', "it must be width and height in pixels"),
        ('{"source": "a.png", "out": "../b.png"}', "is outside the output folder"),
        ('{"source": "a.png", "out": "b.tiff"}', "b.tiff must end in .png"),
        ('{"source": "a.png", "out": "pidecode-batch.json/b.png"}', "Line 1 of list.jsonl: pidecode-batch.json in the"),
    ],
)
def test_a_wrong_line_of_a_manifest_fails_alone(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(f'{line}\n{{"source": "b.png"}}\n')
    wrong, other = collect_jobs(path, OutputNaming(out=tmp_path / "o"))
    assert words in str(wrong.error)
    assert other.error is None


def test_sources_without_jobs_are_refused(tmp_path: Path) -> None:
    out = OutputNaming(out=tmp_path / "o")
    with pytest.raises(FileError, match="There is no .*nowhere"):
        collect_jobs(tmp_path / "nowhere", out)
    with pytest.raises(FileError, match="holds no image .* and no latent"):
        collect_jobs(tmp_path, out)
    (tmp_path / "a.png").touch()
    (tmp_path / "a.jpg").touch()
    with pytest.raises(
        SettingError, match="a.jpg and a.png would both be written to .*a.png. Keep their suffixes.*in a manifest"
    ):
        collect_jobs(tmp_path, out)
    assert len(collect_jobs(tmp_path, OutputNaming(out=tmp_path / "o", keep_suffix=True))) == 2
    with pytest.raises(SettingError, match="is the source folder"):
        collect_jobs(tmp_path, OutputNaming(out=tmp_path))
    (tmp_path / "x.txt").touch()
    with pytest.raises(FileError, match="neither an image"):
        collect_jobs(tmp_path / "x.txt", out)


def test_a_run_decodes_skips_and_explains_failures(tmp_path: Path, config: WorkerConfig) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put(source / "deep/b.safetensors", seed=1)
    put(source / "a.safetensors")
    put(source / "many.safetensors", count=3)
    (source / "broken.safetensors").write_bytes(b"nonsense")
    save_file({"x": torch.zeros(1, 128, 1, 1)}, source / "foreign.safetensors")
    first = go(source, out, config)
    assert states(first) == {
        "a.safetensors": "done", "broken.safetensors": "failed", "deep/b.safetensors": "done",
        "foreign.safetensors": "failed", "many.safetensors": "done",
    }  # fmt: skip
    assert first.images == 5
    assert not first.complete
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == [
        "a.png", "deep/b.png", "many-1.png", "many-2.png", "many-3.png",
    ]  # fmt: skip
    why = {item.name: item.message or "" for item in first.failures}
    assert "is a text, not tensors" in why["broken.safetensors"]
    assert "does not say which latent space" in why["foreign.safetensors"]
    metadata = read_metadata(out / "many-2.png")
    assert metadata is not None
    assert (metadata["source"], metadata["seed"]) == ("many.safetensors", 1)
    # The same command again: nothing is decoded, and what failed and is repaired now is done.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (source / "broken.safetensors").unlink()
    (source / "foreign.safetensors").unlink()
    put(source / "broken.safetensors", seed=5)
    (out / "many-2.png").unlink()
    second = go(source, out, config)
    assert second.complete
    assert states(second) == {
        "a.safetensors": "skipped", "deep/b.safetensors": "skipped", "broken.safetensors": "done",
        "many.safetensors": "done",
    }  # fmt: skip
    assert second.images == 2
    after = {path: path.stat().st_mtime_ns for path in before if path.name != "many-2.png"}
    assert after == {path: before[path] for path in after}
    written = json.loads((out / "pidecode-batch.json").read_text())
    assert {key: written[key] for key in ("complete", "jobs", "done", "skipped", "failed", "left", "images")} == {
        "complete": True, "jobs": 4, "done": 2, "skipped": 2, "failed": 0, "left": 0, "images": 2,
    }  # fmt: skip
    assert written["settings"]["options"]["num_steps"] == 1


def test_a_batch_equals_decoding_one_by_one(tmp_path: Path, config: WorkerConfig) -> None:
    put(tmp_path / "in/many.safetensors", count=2, seed=3)
    go(tmp_path / "in", tmp_path / "out", config)
    decoder = PixelDecoder.from_pretrained(config.model, device="cpu")
    images = decoder.decode(Latent.load(tmp_path / "in/many.safetensors"), num_steps=1, seed=0).images
    for index, image in enumerate(images, start=1):
        with Image.open(tmp_path / f"out/many-{index}.png") as found:
            difference = torch.tensor(list(found.tobytes())).int() - torch.tensor(list(image.tobytes())).int()
        assert difference.abs().max() <= 1


def test_other_options_never_replace_an_image_without_overwrite(tmp_path: Path, config: WorkerConfig) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put(source / "a.safetensors")
    put(source / "b.safetensors", seed=1)
    out.mkdir()
    save_image(out / "b.png", Image.new("RGB", (4, 4)))
    go(source, out, config)
    other = WorkerConfig(model=config.model, device="cpu", options=DecodeOptions(num_steps=1, seed=9))
    report = go(source, out, other)
    why = {item.name: item.message or "" for item in report.failures}
    assert "was made with other options or weights. Replace it with overwrite=True" in why["a.safetensors"]
    assert "was not made by a batch" in why["b.safetensors"]
    allowed = WorkerConfig(model=config.model, device="cpu", options=DecodeOptions(num_steps=1, seed=9), overwrite=True)
    assert states(go(source, out, allowed)) == {"a.safetensors": "done", "b.safetensors": "done"}
    assert states(go(source, out, allowed)) == {"a.safetensors": "done", "b.safetensors": "done"}  # made again


def test_all_frames_and_pages_come_out(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "white")]
    (tmp_path / "in").mkdir()
    for name in ("a.gif", "b.tif"):
        frames[0].save(tmp_path / "in" / name, save_all=True, append_images=frames[1:], duration=[40, 80, 120])
    tiny, progress = WorkerConfig(device="cpu"), []
    batch = Batch(
        jobs=collect_jobs(tmp_path / "in", OutputNaming(out=tmp_path / "out")), config=tiny, out=tmp_path / "out"
    )
    report = run_batch(batch, on_progress=lambda job, now: progress.append(str(now)))
    assert report is not None
    assert (report.complete, report.images) == (True, 4)
    written = frames_in(tmp_path / "out/a.gif")
    assert written is not None
    assert (written.durations, written.sizes[0]) == ((40, 80, 120), (32, 32))
    assert "frame 2 of 3, encoding" in progress
    assert "page 3 of 3, encoding" in progress
    assert states(go(tmp_path / "in", tmp_path / "out", tiny)) == {"a.gif": "skipped", "b.tif": "skipped"}
    (tmp_path / "out/b-2.png").unlink()
    assert go(tmp_path / "in", tmp_path / "out", tiny).images == 1


def allocation_failure() -> RuntimeError:
    """What a CPU's allocator raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    return caught.value


def test_images_are_upscaled_and_an_error_stays_with_its_job(tmp_path: Path, config: WorkerConfig) -> None:
    save_image(tmp_path / "photo.png", Image.new("RGB", (20, 17), "teal"))
    decoder = PixelDecoder.from_pretrained(config.model, device="cpu")
    decoder.encoder = lambda images: torch.zeros(1, 128, images.shape[2] // 16, images.shape[3] // 16)
    (job,) = collect_jobs(tmp_path / "photo.png", OutputNaming(out=tmp_path / "out", suffix=".jpg"))
    result = Worker(config, decoder).process(job)
    assert (result.state, result.images) == ("done", 1)
    with Image.open(job.out) as image:
        assert image.size == (80, 68)
    assert Worker(config, decoder).process(job).images == 0  # as after a death between writing and reporting

    job.out.unlink()
    for raised in (torch.OutOfMemoryError("CUDA out of memory"), allocation_failure(), MemoryError()):

        def out_of_memory(_: torch.Tensor, raised: BaseException = raised) -> torch.Tensor:
            raise raised

        decoder.encoder = out_of_memory
        result = Worker(config, decoder).process(job)
        assert (result.error, "not enough memory" in (result.message or "")) == ("DoesNotFitError", True)
    decoder.encoder = lambda _: 1 / 0  # type: ignore[assignment,return-value]
    assert Worker(config, decoder).process(job).message == "ZeroDivisionError: division by zero"


def test_an_interrupted_run_reports_and_the_next_resumes(tmp_path: Path, config: WorkerConfig) -> None:
    for index in range(6):
        put(tmp_path / f"in/{index}.safetensors", seed=index)
    out = tmp_path / "out"
    batch = Batch(jobs=collect_jobs(tmp_path / "in", OutputNaming(out=out)), config=config, out=out)

    def stop(result: JobResult) -> None:
        if result.name == "1.safetensors":
            raise KeyboardInterrupt

    report = run_batch(batch, stop)
    assert report is not None
    assert report.interrupted
    assert "the same command resumes" in report.describe()
    made = {path.name for path in out.glob("*.png")}
    assert {"0.png", "1.png"} <= made < {f"{index}.png" for index in range(6)}
    report = run_batch(batch, lambda _: None)
    assert report is not None
    assert report.complete
    assert report.count("skipped") == len(made)


def test_incomplete_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    ours, fresh = tmp_path / "sub/.a.png.0123abcd.pidecode.part", tmp_path / ".b.png.0123abcd.pidecode.part"
    others = [tmp_path / name for name in (".film.mkv.part", ".a.png.12.part", "c.pidecode.part", ".d.0123abcd.part")]
    ours.parent.mkdir()
    for path in (ours, fresh, *others):
        path.touch()
        if path != fresh:
            os.utime(path, (time.time() - 3600,) * 2)
    remove_partial(tmp_path, older_than=600)
    assert not ours.exists()
    assert all(path.exists() for path in (fresh, *others))


def test_a_wrong_header_does_not_make_many_output_paths(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12, 0, 1, 1], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert BatchJob(name="a", source=path, kind="latent", out=tmp_path / "a.png").outputs() == [tmp_path / "a.png"]


def test_the_engine_follows_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_engine(None) == "local"
    with pytest.raises(SettingError, match="torchrun --nproc-per-node=2 -m pidecode batch"):
        choose_engine("torchrun")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_engine(None) == "torchrun"
    with pytest.raises(SettingError, match="each would process the whole batch"):
        choose_engine("local")


def test_the_report_as_text() -> None:
    results = [
        JobResult(name="b", state="failed", seconds=1, error="ImageError", message="b is cut off."),
        JobResult(name="a", state="done", seconds=2, images=2, megapixels=8.0),
        JobResult(name="c", state="skipped", seconds=0),
    ]
    report = BatchReport(jobs=4, results=results, seconds=30.0, engine="ray", workers=2, lost_workers=1)
    assert report.describe().splitlines() == [
        "1 of 4 done, 1 skipped (done before), 1 failed.",
        "2 images in 30 s: 4.0 per minute, with 2 workers (ray).",
        "1 worker died and had to be replaced; their jobs were repeated.",
        "Failed: b: b is cut off.",
        "Stopped with 1 job left; the same command resumes.",
    ]
    both = merge([report, report])
    assert (both.jobs, both.workers, len(both.results), both.seconds) == (8, 4, 6, 30.0)


def test_done_goes_by_the_content_of_source_and_weights(tmp_path: Path, config: WorkerConfig) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    size = put(source / "a.safetensors").stat().st_size
    assert go(source, out, config).complete
    before = (out / "a.png").read_bytes()
    assert put(source / "a.safetensors", seed=1).stat().st_size == size
    assert states(go(source, out, config)) == {"a.safetensors": "done"}  # the source has changed: made again
    after = (out / "a.png").read_bytes()
    assert after != before
    assert states(go(source, out, config)) == {"a.safetensors": "skipped"}
    for place in ("other/a.safetensors", "third/a.latent"):  # another file for the same image, also of the same name
        (tmp_path / place).parent.mkdir()
        put(tmp_path / "b.safetensors", seed=2).rename(tmp_path / place)
        (failure,) = go((tmp_path / place).parent, out, config).failures
        assert "made of another source, a.safetensors in another place than" in (failure.message or "")
        assert str(tmp_path / place) in (failure.message or "")
        assert (out / "a.png").read_bytes() == after
    shutil.copytree(source, tmp_path / "moved")  # the same content elsewhere
    assert states(go(tmp_path / "moved", out, config)) == {"a.safetensors": "skipped"}
    assert states(go(source, out, replace(config, overwrite=True))) == {"a.safetensors": "done"}
    weights = Path(shutil.copy(config.model, tmp_path / "model.safetensors"))
    same = replace(config, model=str(weights))
    assert states(go(source, out, same)) == {"a.safetensors": "skipped"}  # the same weights under another name
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert states(go(source, out, same)) == {"a.safetensors": "failed"}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_damaged_result_is_made_again_and_a_file_of_the_user_s_never(
    tmp_path: Path, config: WorkerConfig, suffix: str
) -> None:
    for index in range(3):
        put(tmp_path / f"in/{index}.safetensors", seed=index)
    put(tmp_path / "in/other.safetensors")
    out = tmp_path / "out"
    go(tmp_path / "in", out, config, suffix=suffix)
    whole = [(out / f"{index}{suffix}").read_bytes() for index in range(3)]
    (out / f"0{suffix}").write_bytes(whole[0][:-20])
    (out / f"1{suffix}").write_bytes(b"")
    (out / f"2{suffix}").write_bytes(bytes(5000))
    (out / f"other{suffix}").write_bytes(b"a text of the user")
    report = go(tmp_path / "in", out, config, suffix=suffix)
    assert [failure.name for failure in report.failures] == ["other.safetensors"]
    assert [(out / f"{index}{suffix}").read_bytes() for index in range(3)] == whole
    assert (out / f"other{suffix}").read_bytes() == b"a text of the user"
    start = whole[0][: 40 if suffix == ".webp" else len(whole[0]) // 2]
    for remains in (start, start.ljust(len(whole[0]), b"\0")):  # a power cut
        (out / f"0{suffix}").write_bytes(remains)
        assert states(go(tmp_path / "in", out, config, suffix=suffix))["0.safetensors"] == "done"
        assert (out / f"0{suffix}").read_bytes() == whole[0]
    if suffix == ".webp":  # its EXIF zeroed from some byte on: the pages of a file that did not reach the disk
        exif = whole[0].rindex(b"EXIF") + 8
        for at in (exif, exif + (len(whole[0]) - exif) // 2):
            (out / f"0{suffix}").write_bytes(whole[0][:at].ljust(len(whole[0]), b"\0"))
            assert states(go(tmp_path / "in", out, config, suffix=suffix))["0.safetensors"] == "done"
            assert (out / f"0{suffix}").read_bytes() == whole[0]
        exif = b"EXIF\x0a\0\0\0" + b"II*\0\x08\0\0\0\0\0"  # a user's may end in zeros
        user = whole[0][: whole[0].rindex(b"EXIF")] + exif
        user = user[:4] + (len(user) - 8).to_bytes(4, "little") + user[8:]
        (out / f"0{suffix}").write_bytes(user)
        assert states(go(tmp_path / "in", out, config, suffix=suffix))["0.safetensors"] == "failed"
    if suffix == ".png":  # a flipped bit
        damaged = bytearray(whole[0])
        damaged[-60] ^= 1
        (out / "0.png").write_bytes(damaged)
        assert states(go(tmp_path / "in", out, config))["0.safetensors"] == "done"


def test_one_entry_never_ends_the_others(tmp_path: Path, config: WorkerConfig) -> None:
    put(tmp_path / "good.safetensors")
    odd = os.fsencode(tmp_path) + b"/\xff.safetensors"
    Path(os.fsdecode(odd)).write_bytes((tmp_path / "good.safetensors").read_bytes())
    out = tmp_path / "out"
    (out / "pidecode-batch.json").mkdir(parents=True)
    (out / "link").symlink_to(tmp_path)
    digits = "9" * 5000
    lines = [
        *(json.dumps({"source": name}) for name in (
            "a\0.png", "\ud800.png", "~nosuchuser/x.png", "x" * 300 + ".png", "good.safetensors/x.png",
        )),
        *(json.dumps({"source": "good.safetensors", "out": name}) for name in (
            "pidecode-batch.json/x.png", "PIDECODE-BATCH.JSON/x.png", "link/x.png", "b\0.png", "y" * 300 + ".png",
        )),
        f'{{"source": "good.safetensors", "seed": {digits}}}',
        '{"source": "good.safetensors", "size": [1e400, 2]}',
        json.dumps({"source": "good.safetensors", "seed": 2**64, "out": "seed.png"}),
        '{"source": "good.safetensors", "out": "caf\\u00e9.png"}',
    ]  # fmt: skip
    data = "\n".join(lines).encode() + b'\n{"source": "\xff.safetensors"}\n'
    (tmp_path / "list.jsonl").write_bytes(data)
    report = go(tmp_path / "list.jsonl", out, config)
    assert (report.jobs, report.count("done"), report.count("failed")) == (15, 1, 14)
    assert not report.complete
    assert "The report could not be written" in report.describe()
    assert (out / "caf\xe9.png").exists()
    assert not (tmp_path / "x.png").exists()
    json.dumps(report.to_dict()).encode("ascii")
    (out / "pidecode-batch.json").rmdir()
    odd_report = go(os.fsdecode(odd), out, config)
    assert (odd_report.complete, os.path.exists(os.fsencode(out) + b"/\xff.png")) == (True, True)
    assert json.loads((out / "pidecode-batch.json").read_bytes().decode("ascii"))["done"] == 1
    assert states(go(os.fsdecode(odd), out, config)) == {os.fsdecode(b"\xff.safetensors"): "skipped"}


def test_all_places_that_will_be_written_are_compared(tmp_path: Path) -> None:
    out = OutputNaming(out=tmp_path / "o")

    def refused(words: str, *names: str) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        if "c.safetensors" in names:
            put(folder / "c.safetensors", count=3)
        with pytest.raises(SettingError, match=words):
            collect_jobs(folder, out)
        shutil.rmtree(folder)

    refused("c-2.png and c.safetensors would both be written to .*c-2.png", "c.safetensors", "c-2.png")
    refused("which some file systems take for .*Cat.png", "Cat.png", "cat.webp")
    refused("which some file systems take for", "caf\xe9.png", "cafe\u0301.jpg")
    refused("a.png would be written to .*A.png, which must be a folder", "a.png", "A.png/b.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").touch()
    with pytest.raises(SettingError, match="would be written over the source"):
        collect_jobs(f"{tmp_path}/in/*.png", OutputNaming(out=tmp_path / "in"))


def test_folders_that_are_not_read_are_reported(
    tmp_path: Path, config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "in/a/good.safetensors")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/a/loop").symlink_to("..")
    for name in ("x.heic", "y.HEIC", "z"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "in/closed").mkdir()
    scandir = os.scandir

    def without_rights(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_rights)
    report = go(tmp_path / "in", tmp_path / "out", config)
    assert states(report) == {"a/good.safetensors": "done", "link": "failed", "a/loop": "failed", "closed": "failed"}
    assert "Left out, as no image and no latent: 1 without an ending, 2 .heic." in report.describe()
    assert report.to_dict()["left_out"] == {".heic": 2, "": 1}
    (only,) = [job for job in collect_jobs(f"{tmp_path}/in/**/*.safetensors", OutputNaming(out=tmp_path / "out"))
               if job.error is None]  # fmt: skip
    assert only.name == "a/good.safetensors"


def test_the_endings_are_those_that_pillow_gives_the_formats_read() -> None:
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in read._FORMATS}
    assert known - set(IMAGE_SUFFIXES) <= {".pfm", ".avifs", ".icb", ".vda", ".vst"}


def test_a_second_batch_on_one_output_folder_is_refused(tmp_path: Path, config: WorkerConfig) -> None:
    put(tmp_path / "in/a.safetensors")
    with FolderLock(tmp_path / "out", "batch"), pytest.raises(FileError, match="is in use by a batch"):
        go(tmp_path / "in", tmp_path / "out", config)


def test_an_interrupt_counts_what_was_written(tmp_path: Path, config: WorkerConfig) -> None:
    for index in range(6):
        put(tmp_path / f"in/{index}.safetensors", seed=index)
    decoder = PixelDecoder.from_pretrained(config.model, device="cpu")
    decode, calls = decoder.decode, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    decoder.decode = interrupted  # type: ignore[method-assign]
    out = tmp_path / "out"
    batch = Batch(jobs=collect_jobs(tmp_path / "in", OutputNaming(out=out)), config=config, out=out)
    report = run_batch(batch, decoder=decoder)
    assert report is not None
    assert report.interrupted
    assert report.images == len(list(out.glob("*.png"))) == 2
    calls[:] = [1, 1]
    report = run_batch(replace(batch, out=tmp_path, jobs=batch.jobs[5:]), decoder=decoder)
    assert report is not None
    assert (report.results, report.interrupted, report.seconds > 0) == ([], True, True)


def test_the_command(tmp_path: Path, config: WorkerConfig) -> None:
    put(tmp_path / "in/a.safetensors")
    command = [
        "batch",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "-m",
        config.model,
        "--device",
        "cpu",
        "--num-steps",
        "1",
    ]
    runner = CliRunner()
    done = runner.invoke(cli, [*command, "--json", "--bits", "16"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["done"] == 1
    (tmp_path / "in/b.safetensors").write_bytes(b"x")
    command[2] = str(tmp_path / "other")
    failed = runner.invoke(cli, command)
    assert failed.exit_code == 1
    assert "Failed: b.safetensors: " in failed.stdout
    assert "--bits 16 acts with" in runner.invoke(cli, [*command, "--bits", "16", "--format", "jpg"]).output
    assert "act with --engine ray only" in runner.invoke(cli, [*command, "--workers", "2"]).output


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_image_in_the_place_of_one_fails_alone(tmp_path: Path, config: WorkerConfig) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (out / "folder.png").mkdir(parents=True)
    os.mkfifo(out / "pipe.png")
    source.mkdir()
    for name in ("folder", "good", "pipe"):
        Latent(torch.zeros(1, 128, 2, 2), "flux2").save(source / f"{name}.safetensors")
    with open(source / "huge.png", "wb") as file:
        file.truncate(2**40)
    report = go(source, out, config)
    why = {result.name: result.message or "" for result in report.results}
    assert "is no regular file, and in the way" in why["folder.safetensors"]
    assert "is no regular file, and in the way" in why["pipe.safetensors"]
    assert "the most that are read with max_pixels=" in why["huge.png"]
    assert states(report)["good.safetensors"] == "done"
    with pytest.raises(FileError, match="null"):
        collect_jobs(source, OutputNaming(out=tmp_path / "a\0b"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs long paths")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_folders_in_any_depth_are_read_or_named(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for name in ["d"] * 1100 + ["d" * 200] * 12:  # deeper than Python calls itself; longer than a path may be
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        if len(name) > 1:
            os.close(os.open("deep.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.close(here)
        here = inner
    os.close(here)
    try:
        jobs = collect_jobs(tmp_path, OutputNaming(out=tmp_path / "out"))
        assert min(job.name.count("/") for job in jobs if job.error is None) == 1100
        assert any("File name too long" in str(job.error) for job in jobs)
        with pytest.raises(SettingError, match="too deep into folders"):
            collect_jobs(f"{tmp_path}/**/*.png", OutputNaming(out=tmp_path / "out"))
        gc.collect()  # glob leaves folders open
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path)], check=True)
