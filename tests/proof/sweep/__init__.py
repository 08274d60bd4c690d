# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sweep: the daemon is killed, or one of its system calls fails, at every point of every operation.

`python -m tests.proof.sweep` boots a lab and runs it there; `inside` is the program that runs in the lab.
"""
