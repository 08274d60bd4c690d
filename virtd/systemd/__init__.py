# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd over D-Bus: its units and jobs, and whether its FD store keeps virtd's descriptors."""
