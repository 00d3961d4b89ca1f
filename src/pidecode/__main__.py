# SPDX-License-Identifier: Apache-2.0
"""`python -m pidecode`: the command line under another name."""

from __future__ import annotations

from pidecode.cli.app import main

if __name__ == "__main__":
    main()
