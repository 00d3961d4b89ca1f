# SPDX-License-Identifier: Apache-2.0
"""`pidecode batch`: decode latents and upscale images of folders, glob patterns and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli.common import (
    bits_option,
    decode_options,
    emit,
    json_option,
    model_options,
    progress,
    source_options,
    take_decode_options,
    threads_option,
)
from pidecode.errors import PidecodeError

if TYPE_CHECKING:
    from pidecode.batch.report import JobResult

_OPTIONS = (
    model_options,
    threads_option,
    bits_option,
    source_options,
    click.option(
        "--format", "suffix", type=click.Choice(["png", "webp", "jpg"]), default="png", show_default=True,
        help="File format of the images.",
    ),
    click.option("--keep-suffix", is_flag=True, help="Write cat.jpg.png for cat.jpg, not cat.png."),
    click.option("--overwrite", is_flag=True, help="Make images again that exist."),
    click.option(
        "--engine",
        type=click.Choice(["local", "torchrun", "ray"]),
        help="What runs the jobs; torchrun if that started the command, else local.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="With Ray: how many; one per GPU if not given."),
    click.option("--ray-address", metavar="ADDRESS", help="With Ray: the cluster; `auto` for this machine's."),
    json_option,
)  # fmt: skip


_CONFIG = (
    "model", "space", "variant", "device", "dtype", "compile", "overwrite", "strip", "keep_profile", "max_pixels",
)  # fmt: skip
"""Parameters of the command that are fields of `WorkerConfig`."""


def _batch_options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@decode_options("decode", "upscale")
@_batch_options
@click.pass_context
def batch(ctx: click.Context, /, source: str, out: Path, as_json: bool, **given: Any) -> None:
    """Write an image into the folder OUT for every image and latent of IN.

    IN is a folder, a pattern in quotes ('in/**/*.jpg'), a .jsonl manifest, or one file. Images that exist are
    skipped, so the same command resumes an interrupted batch; a job that fails does not stop the others. The report
    at the end is in OUT/pidecode-batch.json in full. The exit code is 0 only if every job is done.
    """
    from pidecode.batch.jobs import OutputNaming, collect_jobs
    from pidecode.batch.run import Batch, choose_engine, run_batch
    from pidecode.batch.worker import WorkerConfig

    engine = choose_engine(given["engine"])
    if engine != "ray" and (given["workers"] or given["ray_address"]):
        raise click.UsageError("--workers and --ray-address act with --engine ray only.")
    if engine == "ray" and ctx.get_parameter_source("threads") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--threads acts on this process, and with --engine ray other processes decode.")
    if given["bits"] == "16" and given["suffix"] != "png":
        raise click.UsageError("--bits 16 acts with --format png only.")
    config = WorkerConfig(
        **{name: given[name] for name in _CONFIG}, bits=int(given["bits"]), options=take_decode_options(given)
    )
    naming = OutputNaming(out=out, suffix=f".{given['suffix']}", keep_suffix=given["keep_suffix"])
    jobs = collect_jobs(source, naming)
    whole = Batch(
        jobs=jobs, config=config, out=out, engine=engine, workers=given["workers"], address=given["ray_address"],
        left_out=jobs.left_out,
    )  # fmt: skip
    with progress(len(jobs), "batch", unit="job") as bar:
        failed = 0

        def on_result(result: JobResult) -> None:
            nonlocal failed
            failed += result.state == "failed"
            if result.state == "skipped":
                bar.total -= 1  # so that the estimate of the time left counts the other jobs only
                bar.refresh()
            else:
                bar.update()
            if failed:
                bar.set_postfix(failed=failed)

        report = run_batch(whole, on_result)
    if report is None:  # a process of torchrun with another rank than 0
        return
    emit(report.to_dict(), report.describe, as_json=as_json)
    if report.interrupted:
        raise KeyboardInterrupt
    if not report.complete:
        ctx.exit(PidecodeError.exit_code)
