# SPDX-License-Identifier: Apache-2.0
"""Latents of whole images cached on disk in shards, so that each image is encoded once."""

from __future__ import annotations

import json
import os
import secrets
import threading
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from pidecode.errors import FileError, TrainingError
from pidecode.files import atomic_write, writable_folder
from pidecode.strict_json import JSONError, parse_json
from pidecode.weights.safetensors import read_header, read_safetensors

_KEY = "pidecode_latents"


class LatentShards:
    """A folder of latents by name, for one way of encoding (`identity`); shards of another are ignored.

    Latents are stored as float16: normalized latents are of order one, so that costs about 5e-4 of their spread.
    """

    def __init__(self, folder: str | Path, identity: str, *, per_shard: int = 256) -> None:
        self._folder, self._identity, self._per_shard = Path(os.path.expanduser(folder)), identity, per_shard
        writable_folder(self._folder)
        self._places: dict[str, Path] = {}
        self._waiting: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                header = read_header(path)
                record = parse_json(header.metadata.get(_KEY, "{}"))
            except (FileError, JSONError):
                continue  # its latents are encoded again
            if isinstance(record, dict) and record.get("identity") == self._identity:
                self._places.update(dict.fromkeys(header.tensors, path))

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def get(self, name: str) -> Tensor | None:
        """The latent `[C, h, w]` of that name, float32; None if it is not cached."""
        with self._lock:
            waiting, path = self._waiting.get(name), self._places.get(name)
        if waiting is None and path is not None:
            waiting = read_safetensors(path, [name])[1][name]
        return None if waiting is None else waiting.float()

    def put(self, name: str, latent: Tensor) -> Tensor:
        """Cache a latent `[C, h, w]`; returns it as `get` will from now on."""
        narrow = latent.detach().to("cpu", torch.float16).contiguous()
        if not bool(torch.isfinite(narrow).all()):
            raise TrainingError(f"The encoder gave NaN or infinite values for {name}; is it this space's encoder?")
        with self._lock:
            if name not in self._places:
                self._waiting[name] = narrow
            full = len(self._waiting) >= self._per_shard
        if full:
            self.flush()
        return narrow.float()

    def flush(self) -> None:
        """Write waiting latents as a shard.

        Raises:
            TrainingError: The disk is full or cannot be written; what was cached before stays.
        """
        with self._lock:
            if not self._waiting:
                return
            path = self._folder / f"latents-{os.getpid()}-{secrets.token_hex(6)}.safetensors"
            content = save(self._waiting, {_KEY: json.dumps({"format": 1, "identity": self._identity})})
            try:
                with atomic_write(path) as file:
                    file.write(content)
            except FileError as fault:
                raise TrainingError(f"The latent cache could not grow: {fault}") from fault
            self._places.update(dict.fromkeys(self._waiting, path))
            self._waiting = {}
