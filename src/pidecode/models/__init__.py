# SPDX-License-Identifier: Apache-2.0
"""Torch modules, with the parameter names of the official state dicts."""
