# SPDX-License-Identifier: Apache-2.0
"""Running a PiDNet under memory and speed limits; the plain forward of `models` is the reference."""
