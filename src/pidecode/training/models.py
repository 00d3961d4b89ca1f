# SPDX-License-Identifier: Apache-2.0
"""Models to train: build, initialization, LoRA, which parameters take part.

`pidecode.weights.load` applies such a file without peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pidecode.errors import CheckpointError, MissingDependencyError
from pidecode.models.pid.adapter import Gate
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig
from pidecode.training.config import LoRAConfig
from pidecode.training.noise import seed_of
from pidecode.weights.detect import ADAPTER, COLOR_HEAD
from pidecode.weights.read import read_weights
from pidecode.weights.resolve import resolve_checkpoint


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Draw initial values from a seed made of `parts`, without changing the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(*parts))
        yield


def new_network(config: PiDConfig, seed: int) -> PiDNet:
    """A network with initial values that depend on the run's seed alone.

    Its output and the latent's injections start at zero: a decoder initialized from a backbone starts as that backbone.
    """
    with seeded(seed, "weights"):
        net = PiDNet(config)
        nn.init.xavier_uniform_(net.s_embedder.proj.weight)
        nn.init.zeros_(net.s_embedder.proj.bias)
        for layer in net.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        if config.has_text:
            nn.init.normal_(net.y_pos_embedding, std=0.02)
        for module in net.modules():
            if isinstance(module, Gate):
                module.reset_parameters()
        zero = [net.final_layer.linear]
        if config.has_adapter:
            zero += [*net.lq_proj.output_heads, *([net.lq_proj.pit_head] if config.inject_pixels else [])]
            color_head = net.lq_proj.lq_aux_rgb_head if config.color_head else ()
            # Kaiming-sized values would overflow the output heads' gradients in bfloat16.
            small: list[Any] = [module for module in net.lq_proj.modules() if isinstance(module, nn.Conv2d)]
            for layer in [*small, *(module for module in color_head if isinstance(module, nn.Linear))]:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def initial_weights(source: str) -> dict[str, Tensor]:
    """Tensors of the file or installed model a run starts from, float32."""
    return {name: x.float() for name, x in read_weights(resolve_checkpoint(source).path).tensors.items()}


def load_initial_weights(net: PiDNet, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """Load initial weights; returns the names of tensors that keep their random values, which are only the adapter's.

    A backbone's file has no adapter and a student's none of the color head: those start from random values. A color
    head the network does not have is left out.

    Raises:
        CheckpointError: Any other tensor is missing, left over or of another shape.
    """
    own = net.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if name in own or not name.startswith(COLOR_HEAD)}
    missing = [name for name in own if name not in given]
    allowed = COLOR_HEAD if any(name.startswith(ADAPTER) for name in given) else ADAPTER
    wrong = {
        "lacks": [name for name in missing if not name.startswith(allowed)],
        "has unknown": [name for name in given if name not in own],
        "has other shapes of": [name for name in given if name in own and given[name].shape != own[name].shape],
    }
    for what, names in wrong.items():
        if names:
            raise CheckpointError(
                f"{source} {what} {len(names)} tensors of the network to be trained ({', '.join(sorted(names)[:3])}, "
                "...); it must be of the same architecture, or a backbone of it."
            )
    net.load_state_dict(given, strict=False)
    return missing


def set_trainable(net: PiDNet, trainable: str, *, color: bool) -> None:
    """Set `requires_grad` of all parameters; those that cannot change the output get no gradient and are frozen."""
    last = f"patch_blocks.{net.config.patch_depth - 1}."
    frozen = [last + part for part in ("attn.proj_y.", "attn.q_norm_y.", "norm_y2.", "mlp_y.")]
    frozen += [] if color else [COLOR_HEAD]
    trained = ADAPTER if trainable == "adapter" else ""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(trained) and not name.startswith(tuple(frozen)))


_LORA_TARGETS: Mapping[str, str] = {  # linear layers of each choice of `lora.targets`
    "attention": r"patch_blocks\.\d+\.attn\.(qkv_x|proj_x)",
    "mlp": r"patch_blocks\.\d+\.mlp_x\.(w1|w2|w3)",
    "pixel_mlp": r"pixel_blocks\.\d+\.mlp\.(fc1|fc2)",
}


def inject_lora(net: nn.Module, config: LoRAConfig, seed: int) -> None:
    """Add low-rank adapters, which change nothing yet, and train only them."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingDependencyError(
            "Low-rank adapters need peft; install it with: pip install 'pidecode[train]'."
        ) from None
    pattern = "|".join(_LORA_TARGETS[part] for part in config.targets)
    alpha = config.alpha or config.rank
    peft_config = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=f"(.*\\.)?({pattern})")
    with seeded(seed, "adapters"):
        inject_adapter_in_model(peft_config, net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapted network's tensors, the adapters': `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    # "default" is peft's name for a sole adapter.
    return {name.replace(".default.", "."): tensor for name, tensor in tensors.items() if ".lora_" in name}
