# SPDX-License-Identifier: Apache-2.0
"""`make attack`: seeded hostile inputs for every reader and endpoint, and kill -9 of batches and trainings.

A trial survives if it ends in a value or in one of the package's own errors, within seconds and without much memory.
Anything else is a fault: another exception, a hang, a crash, memory, an answer of 500, weights that are not finite,
an image or a checkpoint that is not whole. The exit code is 0 only without faults.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "serving")]

KINDS = {
    "latent files": ("readers", "latent_files", 180),
    "weights files": ("readers", "weights_files", 120),
    "pickles": ("readers", "pickles", 180),
    "encoders, adapters": ("readers", "encoders_and_adapters", 120),
    "prompt states": ("readers", "prompt_states", 80),
    "images, metadata": ("readers", "images", 200),
    "manifests": ("readers", "manifests", 120),
    "training files": ("readers", "training_files", 120),
    "command line": ("readers", "command_line", 120),
    "endpoints": ("live", "endpoints", 250),
    "batches": ("live", "hostile_batches", 30),
    "killed batches": ("live", "killed_batches", 20),
    "killed trainings": ("live", "killed_trainings", 20),
}
"""Module, function and number of trials of every kind."""

MOST_SECONDS = 10.0
"""For one step of a trial, but for runs that are killed."""
MOST_SECONDS_OF_A_RUN = 60.0
MOST_MEMORY = 500 * 2**20
"""Growth of a process's largest memory by one trial, in bytes."""


def run_kind(name: str, seed: int, count: int, results: Connection) -> None:
    """Send `(index, fault or None)` for every trial of a kind."""
    import importlib

    import torch

    from pidecode.errors import PidecodeError

    torch.set_num_threads(1)
    module, function, _ = KINDS[name]
    warnings.simplefilter("ignore")
    rng = Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory() as folder:
        trials = getattr(importlib.import_module(f"attack.{module}"), function)(rng, Path(folder))
        limit = MOST_SECONDS if not name.startswith("killed") else MOST_SECONDS_OF_A_RUN
        for index in range(count):
            fault = None
            steps = next(trials)
            memory = _peak()
            for step in steps:
                began = time.monotonic()
                try:
                    step()
                except PidecodeError:
                    pass
                except BaseException as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    fault = (
                        f"{type(error).__name__}: {str(error)[:300]} ({where.filename.split('/')[-1]}:{where.lineno})"
                    )
                if (seconds := time.monotonic() - began) > limit:
                    fault = f"took {seconds:.1f} s"
            if (grown := _peak() - memory) > MOST_MEMORY:
                fault = f"took {grown / 2**20:.0f} MB"
            results.send((index, fault))
        trials.close()
    results.send(None)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--kind", choices=KINDS, action="append", help="Only this kind; repeatable.")
    parser.add_argument("--count", type=int, help="Number of trials of each kind.")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began, faults, tried = time.monotonic(), 0, 0
    print(f"seed {args.seed}\n{'kind':22}{'tried':>7}{'survived':>10}{'seconds':>9}", flush=True)
    for name in args.kind or KINDS:
        start, done, failed = time.monotonic(), 0, []
        for index, fault in attack(name, args.seed, args.count or KINDS[name][2]):
            done += 1
            if fault:
                failed.append(f"  {name} {index}: {fault}")
        print(f"{name:22}{done:7}{done - len(failed):10}{time.monotonic() - start:9.0f}", flush=True)
        print(*failed, sep="\n", end="\n" if failed else "", flush=True)
        tried, faults = tried + done, faults + len(failed)
    print(f"{'all':22}{tried:7}{tried - faults:10}{time.monotonic() - began:9.0f}")
    sys.exit(1 if faults else 0)


def attack(name: str, seed: int, count: int) -> list[tuple[int, str | None]]:
    """All trials of a kind in a process of its own, which may hang or die without ending the others."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_kind, args=(name, seed, count, theirs))
    process.start()
    theirs.close()
    results: list[tuple[int, str | None]] = []
    while True:
        try:
            if not ours.poll(120):
                raise EOFError
            result = ours.recv()
        except EOFError:
            process.kill()
            process.join()
            results.append((len(results), f"the process hung or died (exit code {process.exitcode})"))
            return results
        if result is None:
            process.join()
            return results
        results.append(result)


if __name__ == "__main__":
    main()
