# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and profiles of decodes."""
