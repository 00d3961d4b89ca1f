# SPDX-License-Identifier: Apache-2.0
"""All of it in order: cache the pictures, train decoder and encoder apart, then together, write the two files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from pidecode.facts.checkpoints import TINY_ENCODER
from pidecode.training.tiny.cache import LatentCache, add_picture, crop_to_multiple, held_out, read_manifest
from pidecode.training.tiny.decoder_stage import DecoderRecipe, run_regressor, small_config
from pidecode.training.tiny.encoder_stage import EncoderRecipe, run_encoder
from pidecode.training.tiny.grow import grown, with_corrections
from pidecode.training.tiny.joint_stage import JointRecipe, Pair, run_joint
from pidecode.training.tiny.procedural import KINDS, procedural_picture
from pidecode.training.tiny.release import load_pair, release_decoder, release_encoder, released_pair
from pidecode.training.tiny.stage import Report
from pidecode.training.tiny.teacher import TeacherAutoencoder

SHRINKS = {"s100": 1.0, "s70": 0.7, "s50": 0.5}
"""Each photograph is cached at these sizes, so that edges are seen at several sharpnesses."""
PROCEDURAL_SIDE = 512
ROUNDS = 4
"""How many rounds of correction the encoder is trained for."""
RELEASED_ROUNDS = 2
"""How many it makes: more bring the picture still nearer, and lead the latent away from its teacher's."""
CORRECTIONS = JointRecipe(
    seed=11, finest_rate=0.0, decoder_rate=0.0, encoder_rate=0.0, corrector_rate=3e-4,
    first_share=0.0, teacher_weight=0.0, noisy_share=0.0,
)  # fmt: skip
"""The corrections alone: a decoder that moves while it is looked at leads them astray."""
CORRECTED = JointRecipe(
    seed=12, finest_rate=1.2e-4, decoder_rate=1e-4, encoder_rate=8e-5, corrector_rate=1.5e-4,
    first_share=0.12, imitation_weight=1.25,
)  # fmt: skip
"""All together once the corrections are worth something."""
HELD = JointRecipe(
    seed=13, finest_rate=0.0, decoder_rate=0.0, encoder_rate=5e-5, corrector_rate=1.5e-4,
    first_share=0.12, teacher_weight=0.0, noisy_share=0.0, imitation_weight=3.0, allowed_difference=0.0018,
)  # fmt: skip
"""The encoder once more, held closer to its teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRun:
    """A whole run: where pictures and teacher lie, and how long each stage takes, in seconds of wall time."""

    data: Path
    """Folder of pictures, with `manifest.jsonl` (file, category) if it has categories."""
    teacher: Path
    """Folder of the two taef2 files."""
    folder: Path
    """Where the cache, the states and the results go; the same folder goes on where it stopped."""
    decoder_seconds: float = 2700.0
    encoder_seconds: float = 2700.0
    joint_seconds: float = 14000.0
    corrections_seconds: float = 1500.0
    """For the encoder's corrections alone."""
    corrected_seconds: float = 3000.0
    """For all together once more, corrections included."""
    held_seconds: float = 900.0
    """For the encoder once more, held closer to its teacher."""
    small_seconds: float = 2000.0
    """For `small`, after `tiny` is done."""
    procedural_seeds: int = 12
    """Rounds of procedural pictures, of every kind once each."""
    fonts: Sequence[Path] = ()
    """TrueType files for rendered text; without them Pillow's own face."""
    start: Path | None = None
    """A released decoder, with its encoder of this package's name beside it, to start from: with the joint stage, or
    with the last two if that encoder corrects its latents already."""
    device: str = "cpu"
    workers: int = 2
    """Processes of the later stages on a processor."""


def build_cache(run: TinyRun, report: Report = lambda line: None) -> LatentCache:
    """Cache every picture that is not held out, at each size, and the procedural ones; what is there is kept."""
    teacher = TeacherAutoencoder.from_folder(run.teacher).to(run.device)
    categories = read_manifest(run.data)
    kept_out = held_out(categories)
    place = run.folder / "cache"

    def encode(picture: Image.Image, shrink: float, folder: Path, name: str) -> None:
        add_picture(
            folder,
            name,
            crop_to_multiple(picture, shrink),
            {"teacher": lambda x: teacher.encode(x.to(run.device)).cpu()},
        )

    for name in sorted(name for names in categories.values() for name in names):
        report(f"caching {name}")
        with Image.open(run.data / name) as picture:
            if name in kept_out:
                encode(picture, 1.0, run.folder / "held_out", Path(name).stem)
                continue
            for label, shrink in SHRINKS.items():
                encode(picture, shrink, place, f"{Path(name).stem}.{label}")
    for seed in range(run.procedural_seeds):
        for kind in KINDS:
            drawn = Image.fromarray(procedural_picture(kind, PROCEDURAL_SIDE, seed, run.fonts))
            encode(drawn, 1.0, place, f"procedural_{kind}_{seed}")
    return LatentCache(place, {"teacher": 1.0})


def train_tiny(run: TinyRun, report: Report = lambda line: None) -> tuple[Path, Path]:
    """Run or resume every stage; returns the paths of the decoder and the encoder, `tiny.safetensors` and its kin.

    Raises CheckpointError without the teacher's files, TrainingError when a stage had to stop.
    """
    cache, teacher = build_cache(run, report), TeacherAutoencoder.from_folder(run.teacher).to(run.device)

    def stage(pair: Pair, folder: Path, recipe: JointRecipe) -> Pair:
        run_joint(pair, cache, folder, replace(recipe, device=run.device, workers=run.workers), teacher, report)
        return load_pair(folder / "joint.pt")

    pair = _start(run, cache, teacher, report)
    if not pair.encoder.config.rounds:
        pair = stage(pair, run.folder, JointRecipe(seconds=run.joint_seconds))
        pair = Pair(pair.decoder, with_corrections(pair.encoder, ROUNDS))
        pair = stage(pair, run.folder / "corrections", replace(CORRECTIONS, seconds=run.corrections_seconds))
    pair = stage(pair, run.folder / "corrected", replace(CORRECTED, seconds=run.corrected_seconds))
    stage(pair, run.folder / "held", replace(HELD, seconds=run.held_seconds))
    state = run.folder / "held" / "joint.pt"
    encoder = release_encoder(state, run.folder, rounds=RELEASED_ROUNDS)
    return release_decoder(state, run.folder, variant="tiny"), encoder


def _start(run: TinyRun, cache: LatentCache, teacher: TeacherAutoencoder, report: Report) -> Pair:
    """Decoder and encoder as the joint stage begins with them."""
    if run.start is not None:
        return released_pair(run.start, run.start.parent / TINY_ENCODER)
    decoder = run_regressor(
        cache, run.folder, DecoderRecipe(seconds=run.decoder_seconds, device=run.device), teacher, report=report
    )
    encoder = run_encoder(
        cache, run.folder, EncoderRecipe(seconds=run.encoder_seconds, device=run.device), teacher, report=report
    )
    return Pair(decoder, encoder)


def train_small(run: TinyRun, report: Report = lambda line: None) -> tuple[Path, Path]:
    """`train_tiny`, then a deeper decoder that goes on where its decoder stopped, for the same encoder.

    Returns the paths of `small.safetensors` and of the encoder, which is that of `tiny`.
    """
    _, encoder = train_tiny(run, report)
    pair = load_pair(run.folder / "held" / "joint.pt")
    pair = Pair(grown(pair.decoder, small_config()), pair.encoder)
    teacher = TeacherAutoencoder.from_folder(run.teacher).to(run.device)
    recipe = JointRecipe(
        seconds=run.small_seconds, device=run.device, workers=run.workers, seed=2,
        finest_rate=2e-4, decoder_rate=5e-5, encoder_rate=0.0, corrector_rate=0.0, decay_from=0.1,
    )  # fmt: skip
    run_joint(pair, build_cache(run), run.folder / "small", recipe, teacher, report)
    return release_decoder(run.folder / "small" / "joint.pt", run.folder, variant="small"), encoder
