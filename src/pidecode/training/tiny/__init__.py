# SPDX-License-Identifier: Apache-2.0
"""How the weights that ship with the package are made: data, the three stages of training, the files."""
