# SPDX-License-Identifier: Apache-2.0
"""Reading and writing image files, conversion to tensors, resizing and padding, and metadata in image files."""

from pidecode.images.attributes import KEYWORD
from pidecode.images.read import (
    Frames,
    ImageSource,
    SourceImage,
    frames_in,
    image_size,
    load_image,
    load_tensor,
    read_frames,
    read_image,
    read_images,
)
from pidecode.images.tensors import crop_back, downsampled, fit_to_encoder, is_finite, resize, to_pil, to_tensor
from pidecode.images.write import Animation, DecodeOutput, check_format, encode_image, read_metadata, save_image
from pidecode.units import MAX_PIXELS

__all__ = [
    "KEYWORD", "MAX_PIXELS", "Animation", "DecodeOutput", "Frames", "ImageSource", "SourceImage", "check_format",
    "crop_back", "downsampled", "encode_image", "fit_to_encoder", "frames_in", "image_size", "is_finite", "load_image",
    "load_tensor", "read_frames", "read_image", "read_images", "read_metadata", "resize", "save_image", "to_pil",
    "to_tensor",
]  # fmt: skip
