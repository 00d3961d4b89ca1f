# SPDX-License-Identifier: Apache-2.0
"""Elementwise ops and matrix products of the engine, each with a plain reference implementation."""
