# SPDX-License-Identifier: Apache-2.0
"""Any readable network file -> one .safetensors that says what it is and loads with no further argument."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from pidecode.errors import SettingError
from pidecode.files import atomic_write, check_writable, read_small
from pidecode.registry.checkpoints import APACHE_2, NSCL_V1, License
from pidecode.registry.configs import PiDConfig
from pidecode.units import parse_dtype
from pidecode.weights.detect import COLOR_HEAD, Overrides, detect
from pidecode.weights.load import check_complete, empty_network
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import read_weights
from pidecode.weights.safetensors import write_safetensors

_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt")
_LICENSES: Mapping[str, License] = {license.name: license for license in (NSCL_V1, APACHE_2)}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    overrides: Overrides | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> CheckpointMetadata:
    """Write the network of `source` to `target` (.safetensors) with its configuration, space, variant and license.

    Weights under a license that is not free keep its text beside them, in `<target>.LICENSE.txt`. After an error
    nothing is left behind.

    Args:
        source: Any file that `read_weights` reads.
        target: The file to write.
        overrides: What the caller knows of the source; see `detect`.
        dtype: "float32", "bfloat16" or "float16"; None keeps that of the source.
        overwrite: Whether an existing file may be replaced.

    Raises:
        CheckpointError: The source is damaged or incomplete.
        SettingError: The source is ambiguous, or an argument is wrong.
        FileError: The target exists or cannot be written.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise SettingError(f"{target} does not end in .safetensors, which is what is written; rename it.")
    wanted = getattr(torch, parse_dtype(dtype)) if dtype else None
    check_writable(target, overwrite=overwrite)
    file = read_weights(source)
    metadata = detect(file, overrides)
    config = metadata.config
    assert config is not None  # detect refuses encoders
    if isinstance(config, PiDConfig):  # the color head may have been left out of the file
        config = replace(config, color_head=any(name.startswith(COLOR_HEAD) for name in file.tensors))
    metadata = replace(metadata, config=config)
    check_complete(file.tensors, empty_network(config).state_dict(), source)
    license = _LICENSES.get(metadata.license or "")
    parts = ("PiD", metadata.space, metadata.variant, None if metadata.kind == "student" else metadata.kind)
    spec = {"sai_model_spec": "1.0.0", "architecture": "pid", "title": " ".join(filter(None, parts))}
    spec |= {"license": metadata.license} if metadata.license else {}
    about = {f"modelspec.{name}": value for name, value in spec.items()} | metadata.to_metadata()
    write_safetensors(target, file.tensors, about, dtype=wanted, overwrite=overwrite)
    if license and not license.commercial:
        with atomic_write(target.with_suffix(".LICENSE.txt"), overwrite=True) as text:
            text.write(license_text(Path(source), license).encode("utf-8"))
    return metadata


def license_text(source: Path, license: License) -> str:
    """The license's text from beside the source or the top of its repository; else a note of where it stands.

    A text that does not name the license's owner is some other project's, and is passed over.
    """
    owner = license.title.split()[0]
    places = [folder / name for folder in source.absolute().parents[:3] for name in _LICENSE_FILES]
    for path in (source.with_suffix(".LICENSE.txt"), *places):
        with suppress(OSError):
            if owner in (text := read_small(path).decode("utf-8", "replace")):
                return text
    terms = "It allows commercial use." if license.commercial else "It does not allow commercial use."
    return (
        f"The weights beside this file were converted from {source.name}, which is under the\n"
        f"{license.title}. {terms}\nIts text, which is what binds, stands at {license.url}.\n"
        "Converting changed the file's format, not its terms.\n"
    )
