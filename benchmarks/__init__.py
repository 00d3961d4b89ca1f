# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and quality of decodes, measured from a checkout: `python -m benchmarks.decode --help`."""
