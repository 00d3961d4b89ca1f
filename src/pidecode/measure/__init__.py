# SPDX-License-Identifier: Apache-2.0
"""Measuring: pictures to numbers."""
