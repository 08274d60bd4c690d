# SPDX-License-Identifier: LGPL-2.1-or-later
"""What domains and containers have in common: a process that is there for its own sake, with a console."""
