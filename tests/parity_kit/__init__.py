# SPDX-License-Identifier: Apache-2.0
"""Checks of this implementation against tensors recorded from the reference."""
