# SPDX-License-Identifier: LGPL-2.1-or-later
"""Volume groups and NFS, which need a kernel of their own: see __main__.py."""
