# SPDX-License-Identifier: Apache-2.0
"""Training: losses with their gradients, noising, the discriminator, and steps of teacher, student and fake score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity_kit.files import Case, Comparison
from pidecode.sampling import clean_from_velocity, shifted, velocity_from_clean
from pidecode.training.denoiser import Denoiser, TrainBatch
from pidecode.training.dmd import Discriminator, DistillationConfig, DistillationModels, fake_score_loss, student_loss
from pidecode.training.flow_matching import TeacherLossConfig, teacher_loss
from pidecode.training.losses import (
    RepresentationAlignment,
    approximate_r1,
    color_alignment,
    discriminator_adversarial,
    distribution_matching,
    encoder_input,
    feature_alignment,
    flow_matching,
    generator_adversarial,
    to_ycbcr,
)
from pidecode.training.noise import LatentNoiseConfig, mix, noise_latent, per_sample

ABSOLUTE, RELATIVE = 1e-6, 1e-4
FORWARD = 2e-5
SAMPLING = 1e-4


class RecordedRNG:
    """Recorded rng instead of fresh ones, each kind in its own order."""

    def __init__(
        self, normals: list[Tensor] | None = None, uniforms: list[Tensor] | None = None, choice: Tensor | None = None
    ) -> None:
        self._normals, self._uniforms = iter(normals or ()), iter(uniforms or ())
        self._choice = choice

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        drawn = next(self._normals)
        assert tuple(drawn.shape[1:]) == shape
        return drawn

    def uniform(self) -> Tensor:
        return next(self._uniforms)

    def choice(self, count: int) -> Tensor:
        assert self._choice is not None
        return self._choice

    def common_choice(self, count: int) -> int:
        raise AssertionError("no recorded case rolls the student out")


def _close(name: str, actual: Tensor, case: Case) -> Comparison:
    return Comparison(name, actual, case.outputs[name], ABSOLUTE, RELATIVE)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(True)


def _gradient(loss: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, of, retain_graph=True)
    return gradient


def vsd(case: Case) -> Iterator[Comparison]:
    """Variational score distillation; the degenerate case divides by almost nothing."""
    generated = _leaf(case.inputs["gen"])
    loss = distribution_matching(generated, case.inputs["teacher"], case.inputs["fake"])
    yield _close("loss", loss.float(), case)
    yield _close("grad_gen", _gradient(loss, generated), case)


def dsm(case: Case) -> Iterator[Comparison]:
    """Denoising score matching is the flow-matching loss on the student's image."""
    prediction = _leaf(case.inputs["pred_v"])
    loss = flow_matching(prediction, case.inputs["x0"], case.inputs["eps"])
    yield _close("loss", loss, case)
    yield _close("grad", _gradient(loss, prediction), case)


def gan(case: Case) -> Iterator[Comparison]:
    """Both sides of the adversarial loss."""
    fake, real = _leaf(case.inputs["fake_logits"]), _leaf(case.inputs["real_logits"])
    generator, discriminator = generator_adversarial(fake), discriminator_adversarial(fake, real)
    yield _close("gen_loss", generator, case)
    yield _close("disc_loss", discriminator, case)
    yield _close("gen_grad_fake", _gradient(generator, fake), case)
    yield _close("disc_grad_fake", _gradient(discriminator, fake), case)
    yield _close("disc_grad_real", _gradient(discriminator, real), case)


def _discriminator(kwargs: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Discriminator:
    discriminator = Discriminator(
        kwargs["inner_dim"],
        kwargs["num_blocks"],
        tuple(kwargs["feature_indices"] or ()),
        layers=kwargs.get("num_conv_layers", 2),
        per_patch=kwargs.get("patch_logits", False),
    )
    if weights is not None:
        discriminator.load_state_dict(dict(weights))
    return discriminator


def r1(case: Case) -> Iterator[Comparison]:
    """The approximate penalty, on the file's stand-in features."""
    discriminator = _discriminator(case.args["kwargs"], case.weights)

    def judge(x: Tensor) -> Tensor:
        features = torch.tanh(torch.einsum("dc,bchw->bdhw", case.inputs["mix"], x) + per_sample(case.inputs["t"]))
        logits: Tensor = discriminator([features])
        return logits

    x = case.inputs["x"]
    real = judge(x)
    loss = approximate_r1(real, judge(x + case.args["alpha"] * case.inputs["noise"]))
    loss.backward()
    yield _close("real_logits", real, case)
    yield _close("r1", loss, case)
    for name, parameter in discriminator.named_parameters():
        yield _close(f"grad.{name}", _grad_of(parameter), case)


def _grad_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def align(case: Case) -> Iterator[Comparison]:
    """The color loss."""
    settings, predicted = case.args["cfg"], _leaf(case.inputs["pred"])
    low = case.inputs["target"]
    loss = color_alignment(
        predicted,
        low[:, :, 0] if low.ndim == 5 else low,
        case.inputs.get("sigma"),
        case.inputs.get("keep"),
        sigma_power=settings["sigma_power"],
        luma_weight=settings["y_weight"],
        softness=settings["eps"],
    )
    assert settings["chroma_weight"] == 1.0
    yield _close("loss", loss, case)
    yield _close("grad_pred", _gradient(loss, predicted), case)
    yield _close("ycbcr_pred", to_ycbcr((predicted + 1) / 2), case)


def fm(case: Case) -> Iterator[Comparison]:
    """Flow matching on the file's stand-in network; the file records the negated velocity."""
    image, noise, weight = case.inputs["x"], case.inputs["noise"], _leaf(case.inputs["mix"])
    t = shifted(case.inputs["t_normal"].sigmoid(), case.args["shift"])
    x_t = mix(image, noise, t)
    out = torch.tanh(torch.einsum("dc,bchw->bdhw", weight, x_t)) + 0.3 * torch.sin(0.01 * per_sample(t * 1000))
    x0 = case.args["prediction_type"] == "x0"
    velocity = velocity_from_clean(x_t, out, t) if x0 else out
    loss = flow_matching(velocity, image, noise)
    yield _close("t", t, case)
    yield _close("t_scaled", t * 1000, case)
    yield _close("x_t", x_t, case)
    yield Comparison("v_pred", -velocity, case.outputs["v_pred"], FORWARD, RELATIVE)
    clean = out if x0 else clean_from_velocity(x_t, velocity, t)
    yield Comparison("x0_pred", clean, case.outputs["x0_pred"], FORWARD, RELATIVE)
    yield _close("loss", loss, case)
    yield _close("grad_mix", _gradient(loss, weight), case)


def disc(case: Case) -> Iterator[Comparison]:
    """The discriminator on given features."""
    discriminator = _discriminator(case.args["kwargs"], case.weights)
    features = [case.inputs[key] for key in sorted(case.inputs)]
    yield Comparison("logits", discriminator(features), case.outputs["logits"], FORWARD)


def noiser(case: Case) -> Iterator[Comparison]:
    """Noising of latents with recorded rng."""
    given = case.args["cfg"]
    settings = LatentNoiseConfig(
        probability=given["apply_prob"],
        clean_probability=given.get("clean_latent_ratio", 0.0),
        sigma_min=given["add_sigma_min"],
        sigma_max=given["add_sigma_max"],
        by_name=tuple(
            (entry["url_substring"], entry["add_sigma_min"], entry["add_sigma_max"])
            for entry in given.get("url_sigma_overrides") or ()
        ),
    )
    dtype = getattr(torch, case.args.get("dtype", "float32"))
    order = [case.inputs["u_apply"], *(case.inputs[key] for key in ("u_clean",) if key in case.inputs)]
    rng = RecordedRNG([case.inputs["noise"]], [*order, case.inputs["u_sigma"]])
    frame = "variance_preserving" if given["backbone"] == "sdxl" else "flow"
    latent, sigma = noise_latent(case.inputs["latent"].to(dtype), rng, settings, frame, case.args.get("urls", ()))
    yield _close("latent", latent.float(), case)
    yield _close("sigma", sigma, case)


def repa(case: Case) -> Iterator[Comparison]:
    """RepresentationAlignment with recorded encoder features."""
    width, _, encoder_width = case.args["dims"]
    module = RepresentationAlignment(width, nn.Identity(), encoder_width).projector
    module.load_state_dict(dict(case.weights))
    tokens = _leaf(case.inputs["tokens"])
    loss = feature_alignment(module(tokens), case.inputs["dino"])
    yield _close("loss", loss, case)
    yield _close("grad_tokens", _gradient(loss, tokens), case)


def dino_resize(case: Case) -> Iterator[Comparison]:
    """What the encoder is shown."""
    seen = encoder_input(case.inputs["image"], case.args["target_n_tokens"])
    yield Comparison("out", seen, case.outputs["out"], FORWARD)


def _gradients(case: Case, prefix: str, module: nn.Module) -> Iterator[Comparison]:
    """Recorded gradients of one network, and the norm over all of them."""
    parameters = dict(module.named_parameters())
    norm = torch.stack([p.grad.square().sum() for p in parameters.values() if p.grad is not None]).sum().sqrt()
    for key in case.keyed(prefix):
        actual = norm if key == "__global_l2_norm" else _grad_of(parameters[key])
        recorded = case.outputs[f"{prefix}.{key}"]
        # Elements near zero are sums of large ones: the reference, run again, differs from itself by 1e-6 of
        # the tensor's largest element, so that much is allowed on top.
        allowed = ABSOLUTE + 1e-6 * recorded.abs().max().item()
        yield Comparison(f"{prefix}.{key}", actual, recorded, allowed, RELATIVE)


def _train_step(case: Case, settings: TeacherLossConfig) -> Iterator[Comparison]:
    net = case.net(train=True)
    batch = TrainBatch(
        image=case.inputs["image"],
        low=case.inputs.get("lq_image"),
        text=case.inputs["y"],
        latent=case.inputs.get("lq_latent"),
        sigma=case.inputs.get("sigma"),
    )
    output = teacher_loss(Denoiser(net), batch, RecordedRNG([case.inputs["t_normal"], case.inputs["noise"]]), settings)
    output.loss.backward()
    yield _close("total_loss", output.loss, case)
    yield _close("diffusion_loss", output.parts["flow"], case)
    if "color" in output.parts:
        yield _close("lq_latent_image_align_loss", output.parts["color"], case)
    yield from _gradients(case, "grad", net)


def t2i_train_step(case: Case) -> Iterator[Comparison]:
    """A step of the text-to-image backbone with a size-dependent shift."""
    shift = case.args["dynamic_shift"]
    settings = TeacherLossConfig(shift=shift["base_shift"], shift_base_size=shift["base_image_size_for_shift_calc"])
    yield from _train_step(case, settings)


def teacher_train_step(case: Case) -> Iterator[Comparison]:
    """A step of the teacher: flow matching and the color loss."""
    settings = TeacherLossConfig(shift=case.args["shift"], shift_base_size=None, color_weight=case.args["align_weight"])
    yield from _train_step(case, settings)


_DISTILLATION = DistillationConfig()


def _models(case: Case, *, discriminator: bool = True) -> tuple[DistillationModels, TrainBatch]:
    student = Denoiser(case.net(train=True))
    teacher = Denoiser(case.net(case.args["teacher_scale"]))
    fake = Denoiser(case.net(case.args["fake_scale"], train=True))
    prefix = "disc_weights."
    weights = {key.removeprefix(prefix): value for key, value in case.inputs.items() if key.startswith(prefix)}
    judge = _discriminator(case.args["discriminator"], weights) if discriminator else None
    batch = TrainBatch(
        image=case.inputs["x0"],
        text=case.inputs["y"],
        null_text=case.inputs["null_y"],
        latent=case.inputs["lq_latent"],
        sigma=case.inputs["sigma"],
    )
    return DistillationModels(student, teacher, fake, judge), batch


def _distillation_rng(case: Case, *more: Tensor) -> RecordedRNG:
    normals = [case.inputs[key] for key in ("noise", "t_normal", "eps")]
    return RecordedRNG([*normals, *more], choice=case.inputs["step_ids"])


def distill_student_step(case: Case) -> Iterator[Comparison]:
    """The student's phase without and with the discriminator."""
    for variant, discriminator in (("nogan", False), ("gan", True)):
        models, batch = _models(case, discriminator=discriminator)
        output, seen = student_loss(models, batch, _distillation_rng(case), _DISTILLATION, _DISTILLATION.gan_weight)
        output.loss.backward()
        yield _close(f"{variant}.total_loss", output.loss.float(), case)
        yield _close(f"{variant}.vsd_loss", output.parts["dmd"].float(), case)
        if discriminator:
            yield _close("gan.gan_loss_gen", output.parts["g_loss"], case)
        else:
            for name, key in (("student", "x0_student"), ("teacher", "x0_teacher_cfg"), ("fake", "x0_fake")):
                yield Comparison(key, seen[name], case.outputs[key], SAMPLING)
        yield from _gradients(case, f"{variant}.grad", models.student.net)  # type: ignore[arg-type]
    t = case.inputs["t_normal"].sigmoid().clamp(_DISTILLATION.min_time, _DISTILLATION.max_time)
    yield _close("t", t, case)


def distill_fake_step(case: Case) -> Iterator[Comparison]:
    """The other phase: fake score and discriminator."""
    models, batch = _models(case)
    output = fake_score_loss(models, batch, _distillation_rng(case, case.inputs["r1_noise"]), _DISTILLATION)
    output.loss.backward()
    yield _close("total_loss", output.loss, case)
    for name, key in (("fake", "dsm_loss"), ("d_loss", "gan_loss_disc"), ("r1", "gan_loss_r1")):
        recorded = case.outputs[key]
        yield Comparison(key, output.parts[name], recorded, ABSOLUTE, RELATIVE)
    yield from _gradients(case, "grad", models.fake.net)  # type: ignore[arg-type]
    assert models.discriminator is not None
    yield from _gradients(case, "grad_disc", models.discriminator)
