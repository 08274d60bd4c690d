# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hints name operations, and read as commands that there are."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.test_docs import unknown
from virtd import errors, wording
from virtd.hints import Advice, Do, Hint, do, joined, option

ROOT = Path(__file__).resolve().parents[2] / "virtd"
COMMON = ("domain", "container")  # nouns of code that is for either


class Call(NamedTuple):
    """A call of `do` in the code; `noun` None where it is no constant."""

    where: str
    verb: str
    noun: str | None
    options: dict[str, str | bool]


def found() -> list[Call]:
    calls = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "do":
                verb = node.args[0]
                assert isinstance(verb, ast.Constant), f"{path}:{node.lineno}: the verb has to be said"
                noun = node.args[1] if len(node.args) > 1 else ast.Constant("")
                options = {
                    str(one.arg): True if isinstance(one.value, ast.Constant) and one.value.value is True else "VALUE"
                    for one in node.keywords
                }
                name = ast.literal_eval(noun) if isinstance(noun, ast.Constant) else None
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                calls.append(Call(where, ast.literal_eval(verb), name, options))
    return calls


CALLS = found()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.where)
def test_every_operation_is_a_command_with_these_options(call: Call) -> None:
    for noun in COMMON if call.noun is None else (call.noun,):
        command = wording.operation(call.verb, noun, (), call.options)
        assert not unknown(command.removeprefix("virtdctl ")), command


def test_the_calls_are_seen() -> None:
    assert len(CALLS) >= 50
    assert unknown("stop --gently") == ["--gently"]


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (do("status"), "virtdctl status"),
        (do("start", "domain", "web1"), "virtdctl start web1"),
        (do("log", "domain", "web1", stderr=True), "virtdctl log --stderr web1"),
        (do("console", "container", "c", read_only=True), "virtdctl container console --read-only c"),
        (do("resume", "domain", "web1"), "virtdctl resume web1"),
        (do("resume", "container", "c"), "virtdctl container thaw c"),
        (do("stop", "network", "lan", force=True), "virtdctl network stop --force lan"),
        (do("create", "container", "c", ids="3", image="/a b"), "virtdctl container create c --ids 3 --image '/a b'"),
        (
            do("import", "volume", "p", "NEW", "/x.vmdk", from_="vmdk"),
            "virtdctl volume import p NEW /x.vmdk --from vmdk",
        ),
        (do("cancel", "job", "copy-1"), "virtdctl volume cancel copy-1"),
        (do("list", "job"), "virtdctl volume jobs"),
        ("Leave " + option("resume") + " out.", "Leave --resume out."),
        ("Mend it. " + do("reload") + ", or: " + do("fsck") + ".", "Mend it. virtdctl reload, or: virtdctl fsck."),
        (joined("; ", ["ufw allow", do("reload")]), "ufw allow; virtdctl reload"),
        (joined(" ", ["Look."]), "Look."),
    ],
)
def test_it_reads_as_virtdctls_users_write(hint: Hint, text: str) -> None:
    assert str(hint) == text


def test_another_front_end_has_the_operations() -> None:
    hint = "Stop it: " + do("stop", "network", "{lan}", force=True) + "."
    assert isinstance(hint, Advice)
    assert hint.parts == ("Stop it: ", Do("stop", "network", ("{lan}",), (("force", True),)), ".")
    assert hint == "Stop it: " + do("stop", "network", "{lan}", force=True) + "."
    assert len({hint, "Stop it: " + do("stop", "network", "{lan}", force=True) + "."}) == 1
    assert hint == str(hint) == "Stop it: virtdctl network stop --force '{lan}'."  # as from a record
    assert hint != do("stop", "network", "{lan}", force=True)


def test_an_error_crosses_the_wire_as_text() -> None:
    error = errors.InvalidState("It is stopped", hint="Start it: " + do("start", "domain", "a") + ".")
    assert error.fields() == {"message": "It is stopped", "hint": "Start it: virtdctl start a."}


def test_no_driver_has_a_front_ends_words() -> None:
    said = [
        str(path.relative_to(ROOT))
        for inner in ("drivers", "host", "model")
        for path in sorted((ROOT / inner).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "virtdctl" in node.value
    ]
    assert not said
