# SPDX-License-Identifier: LGPL-2.1-or-later
"""What domains and containers have in common: a supervised process with a console."""
