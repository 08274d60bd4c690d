# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which tests may be tried once more: few, and none that proves the promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import again

ROOT = Path(__file__).resolve().parents[3]
NETWORKS = "tests/live/test_networks.py::test_names"


@pytest.mark.parametrize(
    ("tests", "worth"),
    [
        ([], False),
        ([NETWORKS], True),
        ([f"{NETWORKS}[{number}]" for number in range(3)], True),
        ([f"{NETWORKS}[{number}]" for number in range(4)], False),
        ([NETWORKS, "tests/live/test_survival_table.py::test_nothing_is_lost"], False),
        (["tests/live/test_sweep.py::test_a_sample[1]"], False),
    ],
)
def test_what_is_tried_again(tests: list[str], worth: bool) -> None:
    assert again.worth_another_try(tests) is worth


def test_what_proves_the_promise_is_there() -> None:
    assert [name for name in again.PROMISE if not (ROOT / name).is_file()] == []
