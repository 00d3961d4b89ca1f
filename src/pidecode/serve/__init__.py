# SPDX-License-Identifier: Apache-2.0
"""HTTP server: one FastAPI app with the page at /, the API at /v1, and one job queue for one device."""
