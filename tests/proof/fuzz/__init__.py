# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fuzzing: each module here (but those with an underscore) is one target, given bytes that nobody wrote on purpose.

A target's module has

    def target(data: bytes) -> None     what is tried; raising anything is a finding. Errors that are meant to be
                                        raised (InvalidDefinition, ValueError of records.decode) it catches itself
    SEEDS: tuple[bytes, ...]            good inputs, and ones that once were a problem
    WORDS: tuple[bytes, ...] = ()       what to put in here and there; optional
    LIMIT: int = 4096                   bytes that an input has at the most; optional
    BRIEF: int = 1000                   how many inputs the unit tests try; optional, for slow targets

`python -m tests.proof.fuzz` runs all of them, for ten minutes each. tests/unit/tests/test_fuzz.py runs each seed and
each file of corpus/NAME, and then BRIEF changed ones, always the same.
"""
