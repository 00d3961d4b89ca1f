# SPDX-License-Identifier: Apache-2.0
"""The server: an HTTP interface for scripts and other programs, without a page."""
