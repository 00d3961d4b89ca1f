# SPDX-License-Identifier: Apache-2.0
"""Reading and writing image files, conversion to tensors, resizing and padding, and metadata in image files."""

from pidecode.images.read import MAX_PIXELS, ImageSource, image_size, load_image, load_tensor
from pidecode.images.tensors import (
    UnpaddedSize,
    center_crop,
    crop_back,
    downsample,
    lanczos,
    normalize_image,
    pad_to_multiple,
    resize,
    to_array,
    to_pil,
    to_pils,
    to_tensor,
)
from pidecode.images.write import KEYWORD, DecodeOutput, encode_image, read_metadata, save_image

__all__ = [
    "KEYWORD", "MAX_PIXELS", "DecodeOutput", "ImageSource", "UnpaddedSize", "center_crop", "crop_back", "downsample",
    "encode_image", "image_size", "lanczos", "load_image", "load_tensor", "normalize_image", "pad_to_multiple",
    "read_metadata", "resize", "save_image", "to_array", "to_pil", "to_pils", "to_tensor",
]  # fmt: skip
