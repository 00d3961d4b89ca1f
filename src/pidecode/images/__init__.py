# SPDX-License-Identifier: Apache-2.0
"""Reading and writing image files, conversion to tensors, resizing and padding, and metadata in image files."""

from pidecode.images.attributes import KEYWORD, Attributes
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
from pidecode.images.tensors import (
    UnpaddedSize,
    center_crop,
    crop_back,
    downsample,
    downsampled,
    fit_to_encoder,
    is_finite,
    lanczos,
    normalize_image,
    pad_to_multiple,
    resize,
    to_array,
    to_pil,
    to_tensor,
)
from pidecode.images.write import Animation, DecodeOutput, check_format, encode_image, read_metadata, save_image
from pidecode.units import MAX_PIXELS

__all__ = [
    "KEYWORD", "MAX_PIXELS", "Animation", "Attributes", "DecodeOutput", "Frames", "ImageSource", "SourceImage",
    "UnpaddedSize", "center_crop", "check_format", "crop_back", "downsample", "downsampled", "encode_image",
    "fit_to_encoder", "frames_in", "image_size", "is_finite", "lanczos", "load_image", "load_tensor",
    "normalize_image", "pad_to_multiple", "read_frames", "read_image", "read_images", "read_metadata", "resize",
    "save_image", "to_array", "to_pil", "to_tensor",
]  # fmt: skip
