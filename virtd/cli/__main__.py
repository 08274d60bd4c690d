# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python3 -m virtd.cli`: virtdctl from a checkout."""

import sys

from virtd.cli.main import main

sys.exit(main())
