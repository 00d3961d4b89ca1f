# SPDX-License-Identifier: Apache-2.0
"""A name, a path or a hub id -> the weights file on this machine; nothing is ever fetched here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pidecode.errors import CheckpointError, DownloadError, SettingError
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
from pidecode.weights.hub import Hub, command

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A weights file, what is known of it from how it was asked for, and its space's encoder if that is here too."""

    path: Path
    name: str
    space: str | None = None
    variant: str | None = None
    kind: Kind | None = None
    encoder: Path | None = None


def locate(
    name: str | Path,
    *,
    space: str | None = None,
    variant: str | None = None,
    kind: Kind | None = None,
    hub: Hub | None = None,
) -> Found:
    """The weights file that a name stands for.

    name: "tiny" (ships with the package), a file, a folder with one weights file or with official folders in it,
    or a hub id such as "nvidia/PiD". For official folders and that repository, `space` (and `variant`, `kind`)
    choose the file. A file or folder of that very name goes before a hub id.
    Raises CheckpointError or SettingError when the name leads nowhere or to several files, and DownloadError,
    with the command that fetches it, when it is not on this machine.
    """
    hub = hub or Hub()
    bundled = {row.variant: row for row in CHECKPOINTS.values() if row.bundled}
    if str(name) in bundled:
        return _released(bundled[str(name)], asset(bundled[str(name)].path), space, hub)
    path = Path(name).expanduser()
    if not (path.exists() or path.is_symlink() or path.suffix in _SUFFIXES):
        if not _HUB_ID.fullmatch(str(name)):
            raise SettingError(
                f"{str(name)!r} is no file or folder here and no known decoder. Give a path, "
                f"{' or '.join(map(repr, bundled))}, or {REPOSITORY!r} with space=; `pidecode models` lists them."
            )
        if str(name).lower() == REPOSITORY.lower():
            row = _row(space, variant, kind, REPOSITORY)
            return _released(row, _in_official(row, hub), space, hub)
        path = _snapshot(str(name), hub)
    if path.is_dir():
        path = _in_folder(path, space, variant, kind)
    near = encoder_path(get_space(space).name, hub) if space else None
    return Found(path=path, name=path.stem, space=space, variant=variant, kind=kind, encoder=near)


def _released(row: Checkpoint, path: Path, space: str | None, hub: Hub) -> Found:
    if space is not None and row.latent_space and get_space(space).name != row.space:
        raise SettingError(f"{row.variant} decodes latents of space {row.space}, not of {get_space(space).name}.")
    encoder = asset(TINY_ENCODER) if row.bundled else encoder_path(row.space, hub)
    name = row.variant if row.bundled else row.name
    return Found(path=path, name=name, space=row.space, variant=row.variant, kind=row.kind, encoder=encoder)


def asset(name: str) -> Path:
    """A file that ships with the package; reading it says so if this installation lacks it."""
    return Path(str(resources.files("pidecode"))) / "assets" / name


def encoder_path(space: str, hub: Hub | None = None) -> Path | None:
    """The official encoder of a space where `pidecode pull` puts it, a file or a folder; None if it is not there."""
    row, hub = ENCODERS.get(space), hub or Hub()
    if row is None:
        return None
    if not row.path.endswith("/"):
        return hub.cached(row.repository, row.path)
    folder = hub.snapshot(row.repository)
    return folder / row.path if folder and (folder / row.path).is_dir() else None


def encoder_here(space: str | None) -> Path | None:
    """The encoder of a file's own space: the pulled one, else for FLUX.2 the small one that ships with the package."""
    if space is None:
        return None
    name = get_space(space).name
    return encoder_path(name) or (asset(TINY_ENCODER) if name == "flux2" else None)


def _row(space: str | None, variant: str | None, kind: Kind | None, where: str) -> Checkpoint:
    if space is None:
        names = sorted({row.space for row in CHECKPOINTS.values() if not row.bundled})
        raise SettingError(f"{where} holds networks for several latent spaces; say space= one of {', '.join(names)}.")
    return get_checkpoint(space, variant, kind)


def _in_folder(folder: Path, space: str | None, variant: str | None, kind: Kind | None) -> Path:
    weights = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith("."))
    if len(weights) == 1:
        return weights[0]
    official = {row.path: row for row in CHECKPOINTS.values() if not row.bundled}
    here = [row for path, row in official.items() if _official(folder, path)]
    if here:
        row = _row(space, variant, kind, str(folder))
        if found := _official(folder, row.path):
            return found
        names = ", ".join(other.name for other in here)
        raise CheckpointError(f"{folder} has no {row.name} ({row.path}); it has {names}.")
    if weights:
        names = ", ".join(path.name for path in weights[:6])
        raise CheckpointError(f"{folder} holds {len(weights)} weights files ({names}); name the one you mean.")
    raise CheckpointError(f"{folder} holds no weights file ({', '.join(_SUFFIXES)}); name the file.")


def _official(folder: Path, path: str) -> Path | None:
    """The official file below a copy of the repository, or of its `checkpoints` folder."""
    places = (folder / path, folder / path.partition("/")[2])
    return next((place for place in places if place.is_file()), None)


def _in_official(row: Checkpoint, hub: Hub) -> Path:
    if row.bundled:
        return asset(row.path)
    if found := hub.cached(row.repository or REPOSITORY, row.path):
        return found
    teacher = f" --kind {row.kind}" if row.kind == "teacher" else ""
    raise DownloadError(
        f"{row.name} of {row.repository} is not on this machine. Fetch it with "
        f"`pidecode pull {row.space} --variant {row.variant}{teacher}`, which first shows its license "
        f"({row.license.name}), or with {command(row.repository or REPOSITORY, row.path)}."
    )


def _snapshot(repository: str, hub: Hub) -> Path:
    if folder := hub.snapshot(repository):
        return folder
    raise DownloadError(f"{repository} is not on this machine; fetch it with {command(repository, None)}.")
