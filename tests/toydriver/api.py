# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Toy on Varlink."""

from __future__ import annotations

from virtd.api import supervised

OBJECTS = "tests.toydriver.objects"
METHODS = supervised.methods(lambda host: host.supervised("toy"))
