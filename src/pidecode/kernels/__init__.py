# SPDX-License-Identifier: Apache-2.0
"""The same sums, faster; each with a plain twin and a test that they agree."""
