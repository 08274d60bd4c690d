# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a pipe to a log file: moving bytes, growth and rotation of the file, and reading it."""
