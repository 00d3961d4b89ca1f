# SPDX-License-Identifier: Apache-2.0
"""Download of a released decoder with everything it needs, after its license was accepted."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pidecode.errors import LicenseError, SettingError
from pidecode.registry.checkpoints import ENCODERS, TEXT_ENCODER, Checkpoint, NetworkKind, get_checkpoint
from pidecode.strict_json import read_json
from pidecode.weights.resolve import DownloadCallback, HubCache, asset

_MODEL_FILES = ("*.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.model", "LICENSE*", "README.md")
"""What of a transformers repository is needed; never its pickles."""


@dataclass(frozen=True, slots=True)
class RepositoryFiles:
    """Files of a hub repository: one, all below a folder, or those that match any of the patterns."""

    title: str
    repository: str
    file: str | None = None
    folder: str = ""  # with its slash; empty for the repository itself
    patterns: tuple[str, ...] = ("*",)
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class DownloadedCheckpoint:
    """Local paths of a downloaded decoder; None for what was not requested."""

    decoder: Path | None = None
    encoder: Path | None = None
    text_encoder: Path | None = None
    others: tuple[Path, ...] = ()


def checkpoint_files(row: Checkpoint, *, encoder: bool = True, text: bool = True) -> list[RepositoryFiles]:
    """Everything a released decoder needs: itself, its space's encoder and the model it builds on, the text encoder."""
    if row.repository is None:
        return []
    parts = [RepositoryFiles("decoder", row.repository, row.path, revision=row.revision, sha256=row.sha256)]
    source = ENCODERS.get(row.space)
    if encoder and source:
        file, folder = (None, source.path) if source.path.endswith("/") else (source.path, "")
        parts.append(RepositoryFiles("encoder", source.repository, file, folder))
        if source.source:
            parts.append(RepositoryFiles("encoder's model", source.source, patterns=_MODEL_FILES))
        if source.statistics:
            parts.append(RepositoryFiles("encoder's statistics", *source.statistics))
    if text and row.config is not None and row.config.has_text:
        parts.append(RepositoryFiles("text encoder", TEXT_ENCODER, patterns=_MODEL_FILES))
    return parts


def download_checkpoint(
    space: str,
    variant: str | None = None,
    *,
    kind: NetworkKind | None = None,
    accept_license: bool = False,
    encoder: bool = True,
    text: bool = True,
    on_progress: DownloadCallback | None = None,
    hub: HubCache | None = None,
) -> DownloadedCheckpoint:
    """Download a released decoder with its encoder and text encoder into the hub cache.

    Cached files are kept; if everything is cached, neither the network nor the license is needed.

    Args:
        space: Name or alias of the latent space, or "tiny" or "pixeldit".
        variant: None for the space's default.
        kind: None for the distilled student.
        accept_license: Whether the user accepts the license.
        encoder: Whether its image encoder is wanted.
        text: Whether its text encoder is.
        on_progress: Called for every chunk; it may raise Cancelled. The next call resumes.
        hub: The hub cache.

    Raises:
        LicenseError: A non-commercial license was not accepted; the message is the notice to show.
        DownloadError: A file cannot be downloaded.
        SettingError: There is no such decoder.
    """
    hub = hub or HubCache()
    row = get_checkpoint(space, variant, kind)
    if row.repository is None:
        return DownloadedCheckpoint(asset(row.path))
    wanted = checkpoint_files(row, encoder=encoder, text=text)
    here = {part.title: path for part in wanted if (path := cached_files(part, hub))}
    missing = [part for part in wanted if part.title not in here]
    if missing and not (accept_license or row.license.commercial):
        raise LicenseError(
            f"These weights are under the {row.license.title}: for research and evaluation, not for commercial use.\n"
            f"The text that binds stands at {row.license.url}. The encoders and the text encoder keep their own "
            "licenses.\nTo accept, do the same with",
            python="accept_license=True.",
        )
    # All files of a repository come from one commit, although its main branch may move meanwhile.
    listings: dict[str, tuple[str, list[str]]] = {}
    for part in missing:
        if part.revision is None and part.repository not in listings:
            listings[part.repository] = hub.listing(part.repository, part.file)
    for part in missing:
        here[part.title] = _fetch(part, hub, on_progress, *listings.get(part.repository, ("", ())))
    for repository, (commit, _) in listings.items():
        hub.set_main(repository, commit)
    others = tuple(here[part.title] for part in wanted if part.title not in ("decoder", "encoder", "text encoder"))
    return DownloadedCheckpoint(here.get("decoder"), here.get("encoder"), here.get("text encoder"), others)


def cached_files(part: RepositoryFiles, hub: HubCache) -> Path | None:
    """The local path of the files, if all of them are cached; never uses the network."""
    if part.file:
        return hub.cached(part.repository, part.file, part.revision)
    folder = hub.snapshot(part.repository, part.folder)
    if folder is None:
        return None
    names = hub.recorded(part.repository, part.folder).get("files")
    if names is None:  # fetched by another program, or not at all
        complete = part.patterns == _MODEL_FILES and _whole_model(folder)
    else:
        complete = isinstance(names, list) and names != [] and all((folder / str(name)).is_file() for name in names)
    return folder if complete else None


def _whole_model(folder: Path) -> bool:
    """Whether a transformers folder has its configuration and all of its weights."""
    index = folder / "model.safetensors.index.json"
    try:
        weights = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / name).is_file() for name in {"config.json", *weights})


def _fetch(
    part: RepositoryFiles, hub: HubCache, on_progress: DownloadCallback | None, commit: str, listed: Sequence[str]
) -> Path:
    """Download the files, at the part's own revision or else at a commit that holds the listed ones."""
    commit = part.revision or commit
    if part.file:
        return hub.fetch(part.repository, part.file, on_progress, revision=commit, expected=part.sha256)
    patterns = [part.folder + pattern for pattern in part.patterns]
    names = [name for name in listed if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise SettingError(f"{part.repository} has no file like {' or '.join(patterns)}; it must have changed.")
    paths = [hub.fetch(part.repository, name, on_progress, revision=commit) for name in names]
    # So that completeness is checked without the network.
    hub.record(part.repository, part.folder, commit, files=[name.removeprefix(part.folder) for name in names])
    return paths[0].parents[names[0].removeprefix(part.folder).count("/")]
