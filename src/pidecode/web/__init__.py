# SPDX-License-Identifier: Apache-2.0
"""The page: a small site for one person on this machine, with nothing fetched from elsewhere."""
