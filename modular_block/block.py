# SPDX-License-Identifier: Apache-2.0
"""PiD's decode block for diffusers' modular pipelines, as `ModularPipelineBlocks.from_pretrained` loads it."""

from pidecode.integrations.modular import PiDDecodeStep

__all__ = ["PiDDecodeStep"]
