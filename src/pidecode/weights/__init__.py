# SPDX-License-Identifier: Apache-2.0
"""Weights on their way from a name or a file to a network that can run."""
