# SPDX-License-Identifier: Apache-2.0
"""Many images: folders and lists in, resumed where they stopped, on one device, many, or many machines."""
