# SPDX-License-Identifier: Apache-2.0
"""`pidecode batch`: decode latents and upscale images of folders, glob patterns and manifests."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli import common
from pidecode.errors import PidecodeError, SettingError
from pidecode.options import SaveOptions

if TYPE_CHECKING:
    from pidecode.batch.jobs import BatchJob
    from pidecode.batch.report import BatchReport
    from pidecode.sampling import Progress

# Parameters of the command that are fields of `WorkerConfig`.
_CONFIG = (
    "model", "space", "variant", "device", "dtype", "compile", "attention", "overwrite", "strip", "keep_profile",
    "max_pixels", "quality",
)  # fmt: skip


_batch_options = common.combined(
    common.model_options, common.threads_option, common.bits_option, common.source_options, common.save_options,
    click.option("--keep-suffix", is_flag=True, help="Write cat.jpg.png for cat.jpg, not cat.png."),
    click.option("--overwrite", is_flag=True, help="Make images again that exist."),
    click.option("--engine", type=click.Choice(["local", "torchrun", "ray"]),
                 help="What runs the jobs; torchrun if that started the command, else local."),
    click.option("--workers", type=click.IntRange(min=1), help="With Ray: how many; one per GPU if not given."),
    click.option("--ray-address", metavar="ADDRESS", help="With Ray: the cluster; `auto` for this machine's."),
    common.json_option,
)  # fmt: skip


@click.command(cls=common.GroupedCommand)
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@common.decode_options("decode", "upscale")
@_batch_options
@click.pass_context
def batch(ctx: click.Context, /, source: str, out: Path, as_json: bool, **given: Any) -> None:
    """Write an image into the folder OUT for every image and latent of IN.

    IN is a folder, a pattern in quotes ('in/**/*.jpg'), a .jsonl manifest, or one file. Images that exist are
    skipped, so the same command resumes an interrupted batch; a job that fails does not stop the others. The report
    at the end is in OUT/pidecode-batch.json in full. The exit code is 0 only if every job is done.
    """
    with common.WorkBar() as bar:
        report = _run(ctx, source, out, given, bar)
    if report is None:  # a process of torchrun with another rank than 0
        return
    text = report.describe()
    text = text if source.endswith(".jsonl") else common.in_flags(text, ctx.command)
    common.emit(report.to_dict(), text, as_json=as_json)
    if report.interrupted:
        raise KeyboardInterrupt
    if not report.complete:
        ctx.exit(PidecodeError.exit_code)


def batch_folder(ctx: click.Context, folder: Path) -> None:
    """Run `batch` for `upscale` of a folder, with the options given. Raises SettingError for one that cannot act."""
    known = {parameter.name for parameter in batch.params if parameter.name}
    typed = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if others := sorted(typed - known - {"images", "out"}):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise SettingError(f"{folder} is a folder, and {flags} cannot act on a batch; leave it out, or name the files.")
    out = ctx.params["out"] or f"{os.path.abspath(folder)}-upscaled"
    if out == "-":
        raise SettingError(f"{folder} is a folder, and standard output holds one image; name a folder with --out.")
    ctx.invoke(batch, source=str(folder), out=Path(out), **{name: ctx.params[name] for name in typed & known - {"out"}})


def _run(ctx: click.Context, source: str, out: Path, given: dict[str, Any], bar: common.WorkBar) -> BatchReport | None:
    """Run the batch; None in a process of torchrun with another rank than 0."""
    from pidecode.batch.jobs import OutputNaming, collect_jobs
    from pidecode.batch.run import Batch, choose_engine, run_batch
    from pidecode.batch.worker import WorkerConfig

    engine, saved = choose_engine(given["engine"]), SaveOptions(format=given["format"], quality=given["quality"])
    if engine != "ray" and (given["workers"] or given["ray_address"]):
        raise click.UsageError("--workers and --ray-address act with --engine ray only.")
    if engine == "ray" and given["threads"] is not None:
        raise click.UsageError("--threads acts on this process, and with --engine ray other processes decode.")
    if given["bits"] == "16" and saved.format not in (None, "png"):
        raise click.UsageError("--bits 16 acts with --format png only.")
    common.set_threads(given["threads"])
    config = WorkerConfig(
        **{name: given[name] for name in _CONFIG}, bits=int(given["bits"]), options=common.take_decode_options(given)
    )
    suffix = f".{saved.format}".replace("jpeg", "jpg") if saved.format else None
    naming = OutputNaming(out=out, suffix=suffix, keep_suffix=given["keep_suffix"])
    jobs = collect_jobs(source, naming)
    whole = Batch(
        jobs=jobs, config=config, out=out, engine=engine, workers=given["workers"], address=given["ray_address"],
        left_out=jobs.left_out,
    )  # fmt: skip
    results: Counter[str] = Counter()
    begun: set[str] = set()

    def on_progress(job: BatchJob, now: Progress) -> None:
        begun.add(job.name)
        before, total = max(len(begun) - 1, results["done"] + results["failed"]), len(jobs) - results["skipped"]
        failed = f", {results['failed']} failed" if results["failed"] else ""
        bar.show(f"{before + 1}/{total}{failed} {job.name}: {now}", (before + now.done) / total)

    bar.show("looking for what is done already")
    bar.expect([1.0])
    return run_batch(whole, lambda result: results.update([result.state]), on_progress=on_progress)
