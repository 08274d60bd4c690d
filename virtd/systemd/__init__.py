# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd over D-Bus: its units and its jobs, and whether it keeps what virtd gives it."""
