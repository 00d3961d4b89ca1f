# SPDX-License-Identifier: Apache-2.0
"""The parts of the node API V3 that the nodes use."""
