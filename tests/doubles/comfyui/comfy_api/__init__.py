# SPDX-License-Identifier: Apache-2.0
"""The published node API (V3), as far as the nodes use it."""
