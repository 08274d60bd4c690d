# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtd: a host daemon whose guests never notice it going away."""

__version__ = "0.1.0"
