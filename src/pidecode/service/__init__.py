# SPDX-License-Identifier: Apache-2.0
"""What the page and the server share: one queue for one device, the desk that does the work, the guard at the door."""
