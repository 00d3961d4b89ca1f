# SPDX-License-Identifier: Apache-2.0
"""Real-ESRGAN (BSD-3-Clause), frozen: targets to train on, and a baseline. Its weights are not part of this project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pidecode.errors import FileError, MissingDependencyError

X4PLUS = "realesrgan-x4plus"
"""Name of the files of the network for photographs."""


class RealESRGAN:
    """Four times the size by a network of Real-ESRGAN (https://arxiv.org/abs/2107.10833) in ncnn, on the CPU.

    Raises:
        FileError: The folder does not hold the network.
        MissingDependencyError: ncnn is not installed.
    """

    def __init__(self, folder: Path, name: str, threads: int = 1) -> None:
        try:
            import ncnn
        except ImportError:
            raise MissingDependencyError("--models needs ncnn: pip install ncnn.") from None
        self._ncnn, self._net = ncnn, ncnn.Net()
        self._net.opt.use_vulkan_compute = False
        self._net.opt.num_threads = threads
        for ending, load in ((".param", self._net.load_param), (".bin", self._net.load_model)):
            path = folder / f"{name}{ending}"
            if not path.is_file() or load(str(path)) != 0:
                raise FileError(f"{path} is no file of ncnn; --models names the folder of Real-ESRGAN's files.")

    def __call__(self, image: Tensor) -> Tensor:
        """An image `[1, 3, h, w]` in [-1, 1], rounded to eight bits and enlarged."""
        values = ((image[0].clamp(-1, 1) + 1) * 127.5).round().div(255).contiguous().numpy()
        extractor = self._net.create_extractor()
        extractor.input("data", self._ncnn.Mat(values).clone())
        result = np.array(extractor.extract("output")[1])
        return torch.from_numpy(result)[None] * 2 - 1
