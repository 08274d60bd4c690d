# SPDX-License-Identifier: LGPL-2.1-or-later
"""The devices of a guest: each kind is one class, which knows all that there is to know of it."""
