# SPDX-License-Identifier: Apache-2.0
"""One FastAPI app: the page at /, the API at /v1, one queue for one device."""
