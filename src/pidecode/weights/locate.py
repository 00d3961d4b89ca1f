# SPDX-License-Identifier: Apache-2.0
"""From a name to a file on this machine: what ships with the package, what was pulled, or a path."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pidecode.errors import DownloadError, SettingError
from pidecode.facts.checkpoints import (
    CHECKPOINTS,
    ENCODERS,
    REPOSITORY,
    TINY_ENCODER,
    Checkpoint,
    Kind,
    get_checkpoint,
)
from pidecode.facts.spaces import get_space


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A weights file, what is known of it from how it was asked for, and its space's encoder if that is here too."""

    path: Path
    name: str
    space: str | None = None
    variant: str | None = None
    kind: Kind | None = None
    encoder: Path | None = None


def asset(name: str) -> Path:
    """A file that ships with the package."""
    return Path(str(resources.files("pidecode"))) / "assets" / name


def locate(name: str, *, space: str | None = None, variant: str | None = None, kind: Kind | None = None) -> Found:
    """The file of a decoder: "tiny", a path, or the hub repository with `space` (and `variant`, `kind`).

    Raises SettingError for a name that means nothing, DownloadError for a released file that is not here.
    """
    bundled = {row.variant: row for row in CHECKPOINTS.values() if row.bundled}
    if name in bundled:
        return _bundled(bundled[name], space)
    path = Path(name).expanduser()
    if path.exists():
        near = get_space(space).name if space else None
        return Found(
            path=path, name=path.stem, space=space, variant=variant, kind=kind,
            encoder=encoder_path(near) if near else None,
        )  # fmt: skip
    if name != REPOSITORY:
        raise SettingError(
            f"{name!r} is no file here and no known decoder. Give a path, {' or '.join(repr(key) for key in bundled)}, "
            f"or {REPOSITORY!r} with space=; `pidecode models` lists them."
        )
    if space is None:
        raise SettingError(f"{REPOSITORY} holds decoders of several spaces; name one: space='flux', for example.")
    row = get_checkpoint(space, variant, kind)
    found = cached(row.repository or REPOSITORY, row.path)
    if found is None:
        raise DownloadError(
            f"{row.name} is not on this machine. `pidecode pull {row.space} --variant {row.variant}` fetches it, "
            f"after showing its licence ({row.licence.title})."
        )
    return Found(
        path=found, name=row.name, space=row.space, variant=row.variant, kind=row.kind,
        encoder=encoder_path(row.space),
    )  # fmt: skip


def _bundled(row: Checkpoint, space: str | None) -> Found:
    if space is not None and get_space(space).name != row.space:
        raise SettingError(f"{row.variant} decodes latents of space {row.space}, not of {get_space(space).name}.")
    return Found(
        path=asset(row.path), name=row.variant, space=row.space, variant=row.variant, kind=row.kind,
        encoder=asset(TINY_ENCODER),
    )  # fmt: skip


def encoder_path(space: str) -> Path | None:
    """The encoder of a space where `pidecode pull` puts it; None if it is not there."""
    row = ENCODERS.get(space)
    return None if row is None else cached(row.repository, row.path)


def cached(repository: str, path: str) -> Path | None:
    """A file (or, ending in "/", a folder) of a hub repository in the hub's own cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if not path.endswith("/"):
        found = try_to_load_from_cache(repository, path)
        return Path(found) if isinstance(found, str) else None
    for inside in ("config.json", "stat.pt", "model.safetensors", "decoder.pt"):
        found = try_to_load_from_cache(repository, path + inside)
        if isinstance(found, str):
            return Path(found).parent
    return None
