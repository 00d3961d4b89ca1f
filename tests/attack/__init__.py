# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs for everything that reads or runs; `make attack` runs it."""
