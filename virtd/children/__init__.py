# SPDX-License-Identifier: LGPL-2.1-or-later
"""One process: its unit, its pipes and slots, its launch and its ending."""
