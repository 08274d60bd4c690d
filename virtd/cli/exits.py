# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl's exit statuses, the same as systemctl's where it has one."""

from virtd.errors import NotFound, VirtdError

OK = 0
FAILURE = 1
USAGE_ERROR = 2
NOT_RUNNING = 3  # of `status` and `fsck`: there is no daemon
NO_SUCH = 4  # there is no object of that name
INTERRUPTED = 130


def exit_status(error: VirtdError) -> int:
    return NO_SUCH if isinstance(error, NotFound) else FAILURE
