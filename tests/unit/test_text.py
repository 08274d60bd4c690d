# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text that can't be encoded is told all the same, everywhere that text goes."""

from __future__ import annotations

import logging
import subprocess

import pytest

from virtd import journal
from virtd.text import plain, plainly, span, word

ODD = "B\udcfcro \ud800 \x00 ü"


def test_what_a_person_sees() -> None:
    assert plain("ü €") == "ü €"
    assert plain("B\udcfcro") == r"B\xfcro"
    assert plain("\ud800") == r"\ud800"
    assert plainly({ODD: [ODD, 1, None, (ODD,)]}) == {plain(ODD): [plain(ODD), 1, None, [plain(ODD)]]}


class Sent(list[str]):
    def __call__(self, *entry: str) -> None:
        for field in entry:
            field.encode()
        self.extend(entry)


def test_the_journal_takes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent()
    monkeypatch.setattr("systemd._journal.sendv", sent)
    journal.send(ODD, VIRTD_FILE=ODD)
    assert f"MESSAGE={plain(ODD)}" in sent
    assert f"VIRTD_FILE={plain(ODD)}" in sent


def test_logging_never_raises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise ValueError("no words")

    def refuse(*_entry: str) -> None:
        raise OSError(90, "Message too long")

    handler = journal.Handler()
    sent = Sent()
    monkeypatch.setattr("systemd._journal.sendv", sent)
    for message, args in ((ODD, ()), ("%s", (ODD,)), ("%d", ("x",)), ("%s %s", ("x",)), ("%s", (Unspeakable(),))):
        handler.emit(logging.LogRecord("virtd", logging.ERROR, ODD, 1, message, args, None))
    assert sum(field.startswith("MESSAGE=") for field in sent) == 5
    monkeypatch.setattr("systemd._journal.sendv", refuse)
    handler.emit(logging.LogRecord("virtd", logging.ERROR, "", 1, ODD, (), None))
    assert plain(ODD) in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr", None)
    handler.emit(logging.LogRecord("virtd", logging.ERROR, "", 1, ODD, (), None))


def test_spans_are_rounded() -> None:
    spans = {1.99983: "2 s", 2: "2 s", 0.25: "0.25 s", 0.123456: "0.123 s", 99.96: "100 s", 3600: "3600 s"}
    assert {value: span(value) for value in (*spans, 1234567.8)} == spans | {1234567.8: "1234568 s"}


@pytest.mark.parametrize("path", ["/a", "/a b", "/it's", "/$HOME", "/a\nb", "-x", "", "/ü", '/"', "/a;b", "/~", "/*"])
def test_a_word_is_one_to_a_shell(path: str) -> None:
    done = subprocess.run(["sh", "-c", f"printf '<%s>' {word(path)}"], capture_output=True, text=True, check=True)
    assert done.stdout == f"<{path}>"


def test_most_words_need_no_quotes() -> None:
    assert word("/srv/vm-1/a.qcow2") == "/srv/vm-1/a.qcow2"
