# SPDX-License-Identifier: Apache-2.0
"""Measuring: pictures, time and memory to numbers."""
