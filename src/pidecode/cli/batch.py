# SPDX-License-Identifier: Apache-2.0
"""`pidecode batch`: folders, patterns and manifests of latents and images in, larger images out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli.common import emit, json_option, progress, space_option, threads_option
from pidecode.errors import PidecodeError

if TYPE_CHECKING:
    from pidecode.batch.report import Outcome

_WORK = (
    click.option("-m", "--model", default="tiny", show_default=True, help="A model's name, file or folder."),
    space_option,
    click.option("--variant", metavar="NAME", help="Variant of a model that has several: 2k, 2kto4k, ..."),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; chosen for you if not given."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Number format; chosen to fit the device if not given.",
    ),
    click.option("--prompt", help="What the images show, for models that read prompts."),
    click.option("--seed", type=click.IntRange(min=0), help="Of the noise, for each; 0 if not given."),
    click.option("--num-steps", type=click.IntRange(min=1), help="Steps; the model's own number if not given."),
    click.option("--sigma", type=click.FloatRange(0, 1), help="Strength: noise put in first, so more is invented."),
    click.option("--sampler", type=click.Choice(["sde", "ode"]), help="How a few-step model walks; sde if not given."),
    click.option(
        "--fit",
        type=click.Choice(["pad", "crop"]),
        default="pad",
        show_default=True,
        help="For sides of images that do not divide.",
    ),
    click.option(
        "--bits", type=click.Choice(["8", "16"]), default="8", show_default=True, help="Per channel; 16 for png only."
    ),
    click.option("--overwrite", is_flag=True, help="Replace images made otherwise; what is done stays."),
    click.option("--compile", is_flag=True, help="Compile elementwise ops at the first image (experimental)."),
    threads_option,
)
_HOW = (
    click.option(
        "--format", "ending", type=click.Choice(["png", "webp", "jpg"]), default="png", show_default=True, help="Files."
    ),
    click.option("--keep-ending", is_flag=True, help="Write cat.jpg.png for cat.jpg, not cat.png."),
    click.option(
        "--engine",
        type=click.Choice(["local", "torchrun", "ray"]),
        help="What does the work; torchrun if that started the command, else local.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="With Ray: how many; one per GPU if not given."),
    click.option("--ray-address", metavar="ADDRESS", help="With Ray: the cluster; auto for this machine's."),
    json_option,
)


def _options(command: Any) -> Any:
    for option in reversed((*_WORK, *_HOW)):
        command = option(command)
    return command


@click.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@_options
@click.pass_context
def batch(ctx: click.Context, /, source: str, out: Path, as_json: bool, **options: Any) -> None:
    """Make an image in the folder OUT of every image and latent of IN.

    IN is a folder, a pattern in quotes ('in/**/*.jpg'), a .jsonl manifest, or one file. What is done is skipped, so
    the same command goes on where it was stopped; one failure does not stop the rest. At the end comes a report,
    which OUT/pidecode-batch.json holds in full. The exit code is 0 only if everything is done.
    """
    from pidecode.batch.jobs import Naming, collect
    from pidecode.batch.run import Batch, engine_of, run
    from pidecode.batch.worker import Work

    how = {name: options.pop(name) for name in ("ending", "keep_ending", "engine", "workers", "ray_address")}
    engine = engine_of(how["engine"])
    if engine != "ray" and (how["workers"] or how["ray_address"]):
        raise click.UsageError("--workers and --ray-address act with --engine ray only.")
    if engine == "ray" and ctx.get_parameter_source("threads") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--threads acts on this process, and with --engine ray others do the work.")
    jobs = collect(source, Naming(out=out, ending=f".{how['ending']}", keep_ending=how["keep_ending"]))
    options["bits"] = int(options["bits"])
    if options["bits"] == 16 and how["ending"] != "png":
        raise click.UsageError("--bits 16 acts with --format png only.")
    whole = Batch(
        jobs=jobs, work=Work(**options), out=out, engine=engine, workers=how["workers"], address=how["ray_address"]
    )
    with progress(len(jobs), "batch") as bar:
        failed = 0

        def tell(outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.state == "failed"
            if outcome.state == "skipped":
                bar.total -= 1  # the time left is told by those that need work
                bar.refresh()
            else:
                bar.update()
            if failed:
                bar.set_postfix(failed=failed)

        report = run(whole, tell)
    if report is None:  # another process of torchrun leads
        return
    emit(report.to_dict(), report.sentences, as_json=as_json)
    if report.interrupted:
        raise KeyboardInterrupt
    if not report.complete:
        ctx.exit(PidecodeError.exit_code)
