# SPDX-License-Identifier: Apache-2.0
"""Compare this implementation with a folder of golden tensors: `python tests/parity.py DIR`.

Prints file, quantity, largest absolute and relative error; exits 1 if any quantity is out of tolerance.
A part this project has not built is listed as such, never passed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from parity_kit import manifests, network, parts, training
from parity_kit.files import Case, Comparison, read_cases

Check = Callable[[Case], Iterator[Comparison]]

CHECKS: dict[str, Check] = {
    "forward": network.forward,
    "debug": network.intermediates,
    "aux": network.color,
    "features": network.features,
    "sample": network.student,
    "teacher_sample": network.teacher,
    "rope2d": parts.image_rope,
    "rope_text": parts.text_rope,
    "rope_apply": parts.rope_rotation,
    "sincos": parts.pixel_table,
    "temb": parts.timestep,
    "unpatchify": parts.unpatchify,
    "gate": parts.gate,
    "lqproj": parts.adapter,
    "dpm": parts.solver,
    "tlist": parts.student_schedule,
    "x0": parts.velocity,
    "frame": parts.euler_frame,
    "add_noise": parts.noising,
    "downsample": parts.downsampling,
    "normalize": parts.normalizing,
    "text": parts.caption_positions,
    "vsd": training.vsd,
    "dsm": training.dsm,
    "gan": training.gan,
    "r1": training.r1,
    "align": training.align,
    "fm": training.fm,
    "disc": training.disc,
    "noiser": training.noiser,
    "repa": training.repa,
    "dino_resize": training.dino_resize,
    "t2i_train_step": training.t2i_train_step,
    "teacher_train_step": training.teacher_train_step,
    "distill_student_step": training.distill_student_step,
    "distill_fake_step": training.distill_fake_step,
}
"""What each kind of golden case is checked with."""


def check_folder(folder: Path) -> tuple[list[tuple[str, str, Comparison]], list[str]]:
    """All comparisons as (file, case, comparison), and the cases nothing checks."""
    done: list[tuple[str, str, Comparison]] = []
    unbuilt: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        for case in read_cases(path):
            check = CHECKS.get(case.kind)
            if check is None:
                unbuilt.append(f"{path.name} {case.name} ({case.kind})")
                continue
            done.extend((path.name, case.name, comparison) for comparison in check(case))
    for path in sorted(folder.glob("manifest_*.json")):
        check_manifest = manifests.check_for(path)
        if check_manifest is None:
            unbuilt.append(path.name)
            continue
        done.extend((path.name, "manifest", comparison) for comparison in check_manifest(path))
    return done, unbuilt


def main() -> int:
    """Run every check on the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quiet", action="store_true", help="print only what disagrees, and the totals")
    options = parser.parse_args()
    torch.set_grad_enabled(True)
    done, unbuilt = check_folder(options.folder)
    if not done and not unbuilt:
        print(f"{options.folder} holds no golden file (*.safetensors or manifest_*.json).")
        return 2
    failed = 0
    for file, case, comparison in done:
        absolute, relative = comparison.errors
        failed += not comparison.agrees
        if comparison.agrees and options.quiet:
            continue
        verdict = "ok  " if comparison.agrees else "FAIL"
        print(f"{verdict} {file:34s} {case + '.' + comparison.name:64s} abs {absolute:.2e}  rel {relative:.2e}")
    for line in unbuilt:
        print(f"NOT BUILT  {line}")
    print(f"{len(done) - failed} quantities agree, {failed} disagree, {len(unbuilt)} cases not built")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
