# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a pipe to a log file: who moves the bytes, how the file grows and rotates, who reads it."""
