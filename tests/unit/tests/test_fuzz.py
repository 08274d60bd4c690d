# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every target of tests/proof/fuzz, briefly: its seeds, its corpus, and the same few changes of these each time."""

from __future__ import annotations

import itertools
import traceback

import pytest

from tests.proof.fuzz import _engine as engine
from tests.proof.fuzz import _mutate as mutate


@pytest.mark.parametrize("name", engine.names())
def test_target(name: str) -> None:
    target = engine.load(name)
    assert target.seeds, "a target without a seed begins with nothing"
    changed = mutate.inputs(target.inputs(), words=target.words, limit=target.limit, seed=1)
    for data in itertools.chain(target.inputs(), itertools.islice(changed, target.brief)):
        if (exc := engine.attempt(target, data)) is not None:
            pytest.fail(f"{data!r}\n" + "".join(traceback.format_exception(exc)), pytrace=False)


def test_corpus_belongs_to_targets() -> None:
    if engine.CORPUS.is_dir():
        assert {path.name for path in engine.CORPUS.iterdir()} <= set(engine.names())


def test_finding_is_seen(tmp_path: object) -> None:
    def fail(data: bytes) -> None:
        if b"\n" in data:
            raise KeyError(data)

    target = engine.Target("x", fail, (b"a",), (), 100, 100)
    found = [data for data in itertools.islice(mutate.inputs([b"a"]), 1000) if engine.attempt(target, data)]
    assert found
    assert all(b"\n" in data for data in found)
