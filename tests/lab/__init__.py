# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disposable Debian systems with a real systemd as PID 1, for virtd's live tests, demo and benchmarks.

The command is `tests/lab/lab`; README.md beside it is the manual. Standard library only, and nothing of virtd is
imported: the lab must work when the daemon does not even parse.
"""
