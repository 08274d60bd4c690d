# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every driver keeps: named objects with definitions, records and problems, and how they are found again."""
