# SPDX-License-Identifier: Apache-2.0
"""All of it in order: cache the images, train decoder and encoder apart, then together, write the two files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from pidecode.models.tiny import EncoderConfig
from pidecode.registry.checkpoints import TINY_ENCODER
from pidecode.training.tiny.cache import LatentCache, add_image, crop_to_multiple, held_out, read_manifest
from pidecode.training.tiny.decoder_stage import DecoderRecipe, run_regressor, small_config, tiny_config
from pidecode.training.tiny.encoder_stage import EncoderRecipe, run_encoder
from pidecode.training.tiny.grow import between, grown, grown_encoder, with_corrections, with_rounds
from pidecode.training.tiny.joint_stage import JointRecipe, Pair, run_joint
from pidecode.training.tiny.procedural import KINDS, procedural_image
from pidecode.training.tiny.release import load_pair, release_decoder, release_encoder, released_pair
from pidecode.training.tiny.resident import ResidentImages, resident_images
from pidecode.training.tiny.stage import Report
from pidecode.training.tiny.teacher import TeacherAutoencoder
from pidecode.training.tiny.unrolled_stage import UnrolledRecipe, run_unrolled

SHRINKS = {"s100": 1.0, "s70": 0.7, "s50": 0.5}
"""Each photograph is cached at these sizes, so that edges are seen at several sharpnesses."""
PROCEDURAL_SIDE = 640
ROUNDS = 4
"""How many rounds of correction the encoder is made for."""
RELEASED_ROUNDS = 2
"""How many it makes: more bring the image still nearer, and cost a look and an encoding each."""
CORRECTIONS = JointRecipe(
    seed=11, finest_rate=0.0, decoder_rate=0.0, encoder_rate=0.0, corrector_rate=3e-4,
    first_share=0.0, teacher_weight=0.0, noisy_share=0.0,
)  # fmt: skip
"""The corrections alone: a decoder that moves while it is looked at leads them astray."""
MOST_CROPS = {256: 4, 384: 2, 512: 1}
"""Crops of each side in a step of a process on a processor, at most."""
REFINED = UnrolledRecipe(
    seed=60, warmup_steps=150, decay_from=0.35, finest_rate=3e-4, decoder_rate=3e-4, encoder_rate=2e-4,
    corrector_rate=3e-4, rounds=(0.12, 0.0, 0.88), through_looks=True, crops=((256, 64, 0.6), (512, 16, 0.4)),
    similarity_weight=0.2, imitation_weight=2.0, allowed_difference=0.0021, noisy_share=0.15, critic_share=0.3,
)  # fmt: skip
"""All of it, the way it is used, with a critic of its finest detail from the start."""
FINISHED = replace(
    REFINED, seed=61, warmup_steps=120, decay_from=0.25, finest_rate=2.5e-4, decoder_rate=2.5e-4, encoder_rate=1.5e-4,
    corrector_rate=2e-4, allowed_difference=0.0026, critic_share=0.25, coarse_critic_share=0.25,
)  # fmt: skip
"""The same with a second critic, of the image at a quarter of its size."""
DEEPENED = replace(
    FINISHED, seed=62, warmup_steps=60, decay_from=0.1, finest_rate=4e-4, decoder_rate=1e-4, encoder_rate=0.0,
    corrector_rate=0.0, rounds=(0.1, 0.0, 0.9), through_looks=False, crops=((256, 48, 0.6), (512, 12, 0.4)),
)  # fmt: skip
"""The new blocks of `small`, and slowly the rest of its decoder, for the encoder of `tiny`."""
DEEPENED_SHARE = 0.4
"""How much of what that changed is kept."""
SETTLED = replace(
    DEEPENED, seed=63, warmup_steps=30, decay_from=0.0, finest_rate=4e-5, decoder_rate=0.0, rounds=(0.0, 0.1, 0.9),
    crops=((256, 2, 0.6), (384, 1, 0.4)), noisy_share=0.1, teacher_share=0.5, teacher_weight=0.3, critic_share=0.15,
    coarse_critic_share=0.15, critic_rate=5e-5, ema=0.995,
)  # fmt: skip
"""Its finest level once more, on a processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRun:
    """A whole run: where images and teacher lie, and how long each stage takes, in seconds of wall time."""

    data: Path
    """Folder of images, with `manifest.jsonl` (file, category) if it has categories."""
    teacher: Path
    """Folder of the two taef2 files."""
    folder: Path
    """Where the cache, the states and the results go; the same folder goes on where it stopped."""
    decoder_seconds: float = 2700.0
    encoder_seconds: float = 2700.0
    joint_seconds: float = 14000.0
    corrections_seconds: float = 1500.0
    """For the encoder's corrections alone."""
    refined_seconds: float = 800.0
    """For all of it at once, on an accelerator; without one it needs some hundred times as long."""
    finished_seconds: float = 205.0
    """For the same with two critics, likewise."""
    small_seconds: float = 105.0
    """For `small`, after `tiny` is done, likewise."""
    settled_seconds: float = 4000.0
    """For its finest level once more, on a processor."""
    procedural_seeds: int = 24
    """Rounds of procedural images, of every kind once each."""
    fonts: Sequence[Path] = ()
    """TrueType files for rendered text; without them Pillow's own face."""
    start: Path | None = None
    """A released decoder, with its encoder of this package's name beside it, to start from: with the joint stage, or
    with the unrolled one if that encoder corrects its latents already."""
    device: str = "cpu"
    workers: int = 2
    """Processes of the later stages on a processor."""


def build_cache(run: TinyRun, report: Report = lambda line: None) -> LatentCache:
    """Cache every image that is not held out, at each size, and the procedural ones; what is there is kept."""
    teacher = TeacherAutoencoder.from_folder(run.teacher).to(run.device)
    categories = read_manifest(run.data)
    kept_out = held_out(categories)
    place = run.folder / "cache"

    def encode(image: Image.Image, shrink: float, folder: Path, name: str) -> None:
        add_image(
            folder,
            name,
            crop_to_multiple(image, shrink),
            {"teacher": lambda x: teacher.encode(x.to(run.device)).cpu()},
        )

    for name in sorted(name for names in categories.values() for name in names):
        report(f"caching {name}")
        with Image.open(run.data / name) as image:
            if name in kept_out:
                encode(image, 1.0, run.folder / "held_out", Path(name).stem)
                continue
            for label, shrink in SHRINKS.items():
                encode(image, shrink, place, f"{Path(name).stem}.{label}")
    for seed in range(run.procedural_seeds):
        for kind in KINDS:
            drawn = Image.fromarray(procedural_image(kind, PROCEDURAL_SIDE, seed, run.fonts))
            encode(drawn, 1.0, place, f"procedural_{kind}_{seed}")
    return LatentCache(place, {"teacher": 1.0})


def images_of(run: TinyRun) -> ResidentImages:
    """The same images for the unrolled stages, whole and in the device's memory."""
    categories = read_manifest(run.data)
    names = sorted({name for names in categories.values() for name in names} - held_out(categories))
    return resident_images(
        [run.data / name for name in names], torch.device(run.device), shrinks=tuple(SHRINKS.values()),
        procedural_seeds=run.procedural_seeds, procedural_side=PROCEDURAL_SIDE, fonts=run.fonts,
    )  # fmt: skip


def fitted(recipe: UnrolledRecipe, run: TinyRun, seconds: float) -> UnrolledRecipe:
    """The recipe on the run's device; a processor has memory for few of the crops that an accelerator takes at once."""
    crops = recipe.crops
    if torch.device(run.device).type == "cpu":
        crops = tuple((side, min(count, MOST_CROPS[side]), share) for side, count, share in crops)
    return replace(recipe, seconds=seconds, device=run.device, workers=run.workers, crops=crops)


def train_tiny(run: TinyRun, report: Report = lambda line: None) -> tuple[Path, Path]:
    """Run or resume every stage; returns the paths of the decoder and the encoder, `tiny.safetensors` and its kin.

    Raises CheckpointError without the teacher's files, TrainingError when a stage had to stop.
    """
    teacher = TeacherAutoencoder.from_folder(run.teacher)
    pair = _corrected(run, teacher, report)
    decoder = grown(pair.decoder, tiny_config())
    pair = Pair(decoder, grown_encoder(pair.encoder, replace(EncoderConfig(), rounds=pair.encoder.config.rounds)))
    images = images_of(run)

    refined = run.folder / "refined"
    run_unrolled(pair, images, refined, fitted(REFINED, run, run.refined_seconds), teacher, report)
    finished = fitted(FINISHED, run, run.finished_seconds)
    run_unrolled(load_pair(refined / "joint.pt"), images, run.folder / "finished", finished, teacher, report, refined)
    state = run.folder / "finished" / "joint.pt"
    encoder = release_encoder(state, run.folder, rounds=RELEASED_ROUNDS)
    return release_decoder(state, run.folder, variant="tiny"), encoder


def _corrected(run: TinyRun, teacher: TeacherAutoencoder, report: Report) -> Pair:
    """Decoder and encoder as the unrolled stage begins with them: trained apart, together, and with corrections."""
    if run.start is not None:
        pair = released_pair(run.start, run.start.parent / TINY_ENCODER)
        if pair.encoder.config.rounds:
            return Pair(pair.decoder, with_rounds(pair.encoder, ROUNDS))
    cache, at_hand = build_cache(run, report), copy.deepcopy(teacher).to(run.device)
    if run.start is None:
        decoder_recipe = DecoderRecipe(seconds=run.decoder_seconds, device=run.device)
        encoder_recipe = EncoderRecipe(seconds=run.encoder_seconds, device=run.device)
        decoder = run_regressor(cache, run.folder, decoder_recipe, at_hand, report=report)
        pair = Pair(decoder, run_encoder(cache, run.folder, encoder_recipe, at_hand, report=report))

    def stage(pair: Pair, folder: Path, recipe: JointRecipe) -> Pair:
        run_joint(pair, cache, folder, replace(recipe, device=run.device, workers=run.workers), at_hand, report)
        return load_pair(folder / "joint.pt")

    pair = stage(pair, run.folder, JointRecipe(seconds=run.joint_seconds))
    pair = Pair(pair.decoder, with_corrections(pair.encoder, ROUNDS))
    return stage(pair, run.folder / "corrections", replace(CORRECTIONS, seconds=run.corrections_seconds))


def train_small(run: TinyRun, report: Report = lambda line: None) -> tuple[Path, Path]:
    """`train_tiny`, then a deeper decoder that goes on where its decoder stopped, for the same encoder.

    Returns the paths of `small.safetensors` and of the encoder, which is that of `tiny`.
    """
    _, encoder = train_tiny(run, report)
    finished, deepened, settled = (run.folder / name for name in ("finished", "small", "settled"))
    teacher, images = TeacherAutoencoder.from_folder(run.teacher), images_of(run)
    pair = load_pair(finished / "joint.pt")
    start = grown(pair.decoder, small_config())
    pair = Pair(copy.deepcopy(start), pair.encoder)
    run_unrolled(pair, images, deepened, fitted(DEEPENED, run, run.small_seconds), teacher, report, finished)
    pair = load_pair(deepened / "joint.pt")
    pair = Pair(between(start, pair.decoder, DEEPENED_SHARE), pair.encoder)
    run_unrolled(pair, images, settled, fitted(SETTLED, run, run.settled_seconds), teacher, report, deepened)
    return release_decoder(settled / "joint.pt", run.folder, variant="small"), encoder
