# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl's commands, as their users see them: arguments, output, messages, exit statuses."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.fake_daemon import DOMAIN, INFO, KILLED, STOPPED, FakeDaemon
from virtd import __version__, errors
from virtd.cli import exits, output
from virtd.cli.main import COMMANDS, NOUNS

if TYPE_CHECKING:
    pass

ROOT = Path(__file__).resolve().parents[3]
STATUS = {
    "version": "0.1.0",
    "pid": 77,
    "since": "2026-11-23T02:47:54Z",
    "started_reason": "restart",
    "recovered": {"objects": 2, "ms": 3.5, "adopted": ["web1"], "ended": ["db1"], "rolled_back": []},
    "budget": {"used": 10, "max": 4000},
    "problems": [],
    "domains": {"running": 1, "stopped": 1, "paused": 0},
    "degraded": [],
}
PROBLEM = {"object": "web1", "text": "a slot is missing", "hint": "virtdctl stop web1"}


# Finding the command.


def test_help_shows_every_command(virtdctl: Any) -> None:
    ran = virtdctl("--help")
    assert ran.status == 0
    for command in COMMANDS:
        assert f"\n  {command} " in ran.out
    assert virtdctl("help").out == virtdctl("-h").out == ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(virtdctl: Any, command: str) -> None:
    ran = virtdctl(command, "--help")
    assert ran.status == 0
    assert ran.out.startswith(f"usage: virtdctl {command}")
    assert virtdctl("help", command).out == ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_man_page_and_the_completion_know_each_command_and_option(virtdctl: Any, command: str) -> None:
    page = (ROOT / "packaging/man/virtdctl.1.rst").read_text()
    completion = (ROOT / "packaging/virtdctl.bash").read_text()
    assert f"\n``{command}" in page
    assert command in completion.split()
    for option in {
        word.strip(",;[]") for word in virtdctl(command, "--help").out.split() if word.startswith(("--", "[--"))
    }:
        assert option.split("=")[0] in page
        assert option.split("=")[0] in completion


def test_version(virtdctl: Any) -> None:
    assert virtdctl("--version").out == f"virtdctl {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("network", "frobnicate"),
        ("container", "frobnicate"),
        ("volume",),
        ("start",),
        ("info",),
        ("info", "a", "b"),
        ("list", "--state", "flying"),
        ("list", "--json=yaml"),
        ("kill", "-s", "SIGNOTHING", "web1"),
        ("shutdown", "--timeout", "soon", "web1"),
        ("log", "-n", "some", "web1"),
        ("console", "--escape", "abc", "web1"),
        ("start", "--frob", "web1"),
        ("start", "--daemon-tim", "1", "web1"),
    ],
)
def test_wrong_usage_is_2(virtdctl: Any, words: tuple[str, ...]) -> None:
    ran = virtdctl(*words)
    assert ran.status == 2
    assert ran.out == ""
    assert ran.err.startswith("virtdctl")
    assert "Traceback" not in ran.err


class Noun:
    """A module of commands, as those of `virtdctl NOUN` are."""

    COMMANDS = {  # noqa: RUF012 (a module's)
        "list": ("noun_of_a_test", "Things", "", "List things", "list things"),
        "info": ("noun_of_a_test", "Things", "NAME", "Show a thing", "show {name}"),
    }
    OPTIONS = {"list": lambda parser: parser.json(), "info": lambda parser: parser.name()}  # noqa: RUF012

    @staticmethod
    def info(args: Any, _session: Any) -> int:
        raise errors.NotFound(f"There is no thing {args.name}")

    RUN = {"list": lambda args, _session: print("things", args.json) or 7, "info": info}  # noqa: RUF012


@pytest.fixture
def noun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "virtd.cli.noun_of_a_test", Noun)
    monkeypatch.setitem(NOUNS, "thing", ("noun_of_a_test", "Control things"))


@pytest.mark.usefixtures("noun")
def test_a_nouns_commands(virtdctl: Any) -> None:
    for words in (["thing", "list"], ["thing"], ["--address=/x", "thing", "list"]):
        assert (virtdctl(*words).out, virtdctl(*words).status) == ("things None\n", 7)
    assert virtdctl("thing", "list", "--json").out == "things short\n"
    failed = virtdctl("thing", "info", "a")
    assert "Failed to show a" in failed.err
    assert "There is no thing a" in failed.err
    assert failed.status == exits.exit_status(errors.NotFound(""))


@pytest.mark.usefixtures("noun")
def test_a_nouns_help(virtdctl: Any) -> None:
    assert "thing COMMAND" in virtdctl("--help").out
    for words in (["thing", "--help"], ["help", "thing"]):
        assert "virtdctl thing [OPTIONS...] COMMAND ...\n\nControl things.\n" in virtdctl(*words).out
    for words in (["help", "thing", "info"], ["thing", "info", "--help"]):
        assert virtdctl(*words).out.startswith("usage: virtdctl thing info")
    unknown = virtdctl("thing", "fly")
    assert (
        unknown.err == "virtdctl: Unknown command 'thing fly'.\nTry 'virtdctl thing --help' for more information.\n"
    )


def test_options_before_the_command(virtdctl: Any, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTDCTL_ADDRESS")
    daemon.answers["Info"] = {"object": INFO}
    ran = virtdctl("--address", daemon.path, "--json", "info", "web1")
    assert json.loads(ran.out) == INFO
    assert virtdctl("info", "--json", "web1", f"--address={daemon.path}").out == ran.out


# list.


def test_list(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = {"objects": [DOMAIN | {"since": _ago(185)}, STOPPED | {"since": None}]}
    ran = virtdctl("list")
    assert ran.status == 0
    header, stopped, running, empty, footer = ran.out.splitlines()
    assert header.split() == ["NAME", "STATE", "PID", "SINCE", "AUTOSTART", "REASON"]
    assert stopped.split() == ["db1", "stopped", "-", "-", "yes", "-"]
    assert running.startswith("web1 running 4711 3min ")
    assert running.endswith(" ago no        started")
    assert stopped.index("yes") == running.index("no ") == header.index("AUTOSTART")
    assert empty == ""
    assert footer == "2 domains listed."


def _ago(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - seconds))


def test_no_command_lists(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = {"objects": []}
    assert virtdctl().out == "0 domains listed.\n"


def test_list_without_legend(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = {"objects": [STOPPED | {"since": None}]}
    assert virtdctl("list", "--no-legend").out == "db1 stopped - - yes -\n"
    assert virtdctl("--no-legend", "list", "--running").out == ""


def test_list_takes_domains_only_and_filters(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = {"objects": [DOMAIN, STOPPED, DOMAIN | {"name": "default", "driver": "network"}]}

    def names(*words: str) -> list[str]:
        return [item["name"] for item in json.loads(virtdctl("list", "--json", *words).out)]

    assert names() == ["db1", "web1"]
    assert names("--all") == ["db1", "web1"]
    assert names("--running") == ["web1"]
    assert names("--state", "stopped,crashed") == ["db1"]
    assert names("--state=paused") == []


def test_list_json(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = {"objects": [DOMAIN]}
    assert json.loads(virtdctl("list", "--json").out) == [DOMAIN]
    assert virtdctl("list", "--json").out.count("\n") == 1
    assert virtdctl("list", "--json=pretty").out.startswith("[\n  {\n")
    daemon.answers["List"] = {"objects": []}
    assert virtdctl("list", "--json").out == "[]\n"


def test_what_a_guest_wrote_cant_reach_the_terminal(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = {"objects": [DOMAIN | {"reason": "\x1b]0;owned\x07 it\nis"}]}
    out = virtdctl("list").out
    assert "\x1b" not in out
    assert "\\x1b]0;owned\\x07 it is" in out


# info, status, dump, wait.


def test_info(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Info"] = {"object": INFO}
    ran = virtdctl("info", "web1")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert lines[0] == f"● web1 - qemu domain {INFO['uuid']}"
    assert lines[1].startswith("     State: running (started) since Mon 2026-11-23 02:47:54 UTC; ")
    for line in (
        "       PID: 4711",
        "      Unit: virtd-qemu-web1.service",
        "    Memory: 256M",
        "     vCPUs: 2",
        "     Disks: /var/lib/virtd/images/web1.qcow2 (format qcow2)",
        "   Monitor: connected",
        " Autostart: no",
        "Definition: /etc/virtd/qemu/web1.toml",
        "            changed since the start; it takes effect with the next one",
        "   Console: /var/log/virtd/qemu/web1.console.log",
        "     Slots: stdin, stdout",
    ):
        assert line in lines
    assert not any("VNC" in line or "Last exit" in line for line in lines)
    daemon.answers["Info"] = {"object": INFO | {"problems": [{"text": "a slot is lost", "hint": "stop it"}]}}
    assert virtdctl("info", "web1").out.endswith("\n\n● a slot is lost\n  Hint: stop it\n")


@pytest.mark.parametrize(
    ("exit_", "words"),
    [
        (KILLED, "killed by SIGKILL"),
        (KILLED | {"signal": 11}, "killed by SIGSEGV"),
        ({"cause": "guest-shutdown", "code": 0}, "powered off by the guest"),
        ({"cause": "shutdown", "code": 0, "by": "root"}, "shut down by root"),
        ({"cause": "stop", "code": 0, "by": ""}, "stopped"),
        ({"cause": "oom", "signal": 9}, "killed, because the host ran out of memory"),
        ({"cause": "panic", "code": 0}, "the guest's kernel panicked"),
        ({"cause": "failed", "code": 1}, "QEMU failed with exit status 1"),
        ({"cause": "host-shutdown"}, "ended by the shutdown of the host"),
        ({"cause": "unknown", "signal": 99}, "ended by signal 99"),
        ({"cause": "newer", "code": 3}, "ended with exit status 3"),
        ({"cause": "unknown"}, "ended, it isn't known how"),
    ],
)
def test_info_tells_how_it_ended(virtdctl: Any, daemon: FakeDaemon, exit_: dict[str, Any], words: str) -> None:
    daemon.answers["Info"] = {"object": INFO | {"state": "stopped", "pid": None, "exit": exit_}}
    out = virtdctl("info", "web1").out.splitlines()
    assert out[0].startswith("○ web1")
    assert f" Last exit: {words}" in out


def test_info_of_a_name_that_isnt_there_is_4(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Info"] = errors.NotFound("There is no domain nosuch", hint="virtdctl list")
    ran = virtdctl("info", "nosuch")
    assert ran.status == 4
    assert ran.out == ""
    assert ran.err == "Failed to show nosuch: There is no domain nosuch\nHint: virtdctl list\n"


def test_status(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = {"status": STATUS}
    ran = virtdctl("status")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert lines[0] == "● virtd 0.1.0 - host daemon for virtual machines"
    assert lines[1].startswith("     State: running since Mon 2026-11-23 02:47:54 UTC; ")
    assert lines[2:] == [
        "       PID: 77",
        "   Started: restart",
        "   Domains: 1 running, 1 stopped",
        " Recovered: 2 objects in 3.5 ms",
        "            running on: web1",
        "            ended meanwhile: db1",
        "     Slots: 10 of 4000 in use",
    ]
    assert json.loads(virtdctl("status", "--json").out) == STATUS


def test_status_with_problems_is_1(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = {"status": STATUS | {"problems": [PROBLEM]}}
    ran = virtdctl("status")
    assert ran.status == 1
    assert ran.out.endswith("  Problems: 1\n\n● web1: a slot is missing\n  Hint: virtdctl stop web1\n")
    assert virtdctl("status", "--json").status == 1


def test_status_without_a_daemon_is_3(virtdctl: Any, tmp_path: Path) -> None:
    ran = virtdctl("status", "--address", str(tmp_path / "none"))
    assert ran.status == 3
    assert ran.err == "Failed to get the status of virtd: virtd isn't running\nHint: systemctl status virtd\n"
    assert virtdctl("list", "--address", str(tmp_path / "none")).status == 1


ROW = {
    "kind": "slot",
    "object": "qemu/ghost",
    "text": "slot qemu/ghost/stdin is kept, and ghost doesn't run",
    "repair": "drop it",
    "repaired": False,
}
OTHER = {"kind": "unit", "object": "", "text": "it is gone", "repair": "", "repaired": False}


def test_fsck_without_differences(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Check"] = {"differences": [], "objects": 3}
    ran = virtdctl("fsck")
    assert (ran.status, ran.out) == (0, "3 objects checked: no differences.\n")


def test_fsck(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Check"] = {"differences": [ROW, OTHER], "objects": 3}
    ran = virtdctl("fsck")
    assert ran.status == 1
    assert ran.out.splitlines() == [
        "OBJECT     KIND REPAIR           DIFFERENCE",
        "qemu/ghost slot drop it          slot qemu/ghost/stdin is kept, and ghost doesn't run",
        "-          unit by a person only it is gone",
        "",
        "2 differences found, 1 of which virtdctl fsck --repair can repair.",
    ]
    ran = virtdctl("fsck", "--json")
    assert (ran.status, json.loads(ran.out)) == (1, daemon.answers["Check"])


def test_fsck_repairs(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Repair"] = {"differences": [ROW | {"repaired": True}], "objects": 3}
    ran = virtdctl("fsck", "--repair")
    assert ran.status == 0
    assert "done: drop it" in ran.out
    assert ran.out.endswith("1 difference found, 1 repaired.\n")
    daemon.answers["Repair"] = {"differences": [ROW | {"repaired": True}, OTHER], "objects": 3}
    assert virtdctl("fsck", "--repair", "--no-legend").status == 1


def test_fsck_without_a_daemon_is_3_and_says_where_to_look(virtdctl: Any, tmp_path: Path) -> None:
    ran = virtdctl("fsck", "--address", str(tmp_path / "none"))
    assert ran.status == 3
    assert ran.err.startswith("Failed to compare: virtd isn't running\nHint: Only virtd can compare")
    assert "systemd-analyze fdstore virtd.service" in ran.err


def test_dump(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Dump"] = {"text": 'name = "web1"\n'}
    assert virtdctl("dump", "web1").out == 'name = "web1"\n'
    assert json.loads(virtdctl("dump", "web1", "--json").out) == {"name": "web1", "text": 'name = "web1"\n'}


def test_wait(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Wait"] = {"object": DOMAIN}
    assert virtdctl("wait", "web1", "--state=running", "--timeout", "5").out == ""
    assert json.loads(virtdctl("wait", "web1", "--json").out) == DOMAIN
    first, second = daemon.asked("Wait")
    assert first["states"] == ["running"]
    assert 0 < first["timeout"] <= 5
    assert second["states"] == ["stopped", "crashed"]
    assert second["timeout"] is None
    daemon.answers["Wait"] = errors.TimedOut("web1 is still running")
    assert virtdctl("wait", "web1").status == 1


# Changing.


@pytest.mark.parametrize("command", ["start", "stop", "suspend", "resume", "undefine", "reboot", "kill", "shutdown"])
def test_a_change_that_works_says_nothing(virtdctl: Any, daemon: FakeDaemon, command: str) -> None:
    daemon.answers[command.capitalize()] = {"name": "web1", "changed": True, "pid": 1}
    ran = virtdctl(command, "web1", "db1")
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    assert sorted(asked["name"] for asked in daemon.asked(command.capitalize())) == ["db1", "web1"]


def test_undefine_removes_state_on_request_only(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Undefine"] = {"name": "web1"}
    daemon.answers["RemoveState"] = {"name": "web1", "changed": True}
    assert virtdctl("undefine", "web1").status == 0
    assert daemon.asked("RemoveState") == []
    assert virtdctl("undefine", "--remove-state", "web1").status == 0
    assert [asked["name"] for asked in daemon.asked("RemoveState")] == ["web1"]
    daemon.answers["RemoveState"] = errors.InvalidState("Cannot remove the state of web1: it is running")
    assert virtdctl("undefine", "--remove-state", "web1").status == 1
    assert len(daemon.asked("Undefine")) == 2


def test_several_names_end_with_the_first_failure(virtdctl: Any, daemon: FakeDaemon) -> None:
    def start(call: Any) -> dict[str, Any]:
        failures = {
            "b": errors.NotFound("There is no domain b"),
            "c": errors.StartFailed("QEMU said:\nqemu: no such machine", hint="virtdctl log --qemu c"),
        }
        if error := failures.get(call.parameters["name"]):
            raise error
        return {"name": call.parameters["name"], "changed": True, "pid": 1}

    daemon.answers["Start"] = start
    ran = virtdctl("start", "a", "b", "c")
    assert ran.status == 4
    assert ran.err.splitlines() == [
        "Failed to start b: There is no domain b",
        "Failed to start c: QEMU said:",
        "qemu: no such machine",
        "Hint: virtdctl log --qemu c",
    ]
    assert virtdctl("start", "c", "b").status == 1


def test_many_names_are_under_way_at_once(virtdctl: Any, daemon: FakeDaemon) -> None:
    def start(call: Any) -> dict[str, Any]:
        # Answered only when all have asked.
        assert call.until(lambda: len(daemon.asked("Start")) == 10)
        return {"name": call.parameters["name"], "changed": True, "pid": 1}

    daemon.answers["Start"] = start
    assert virtdctl("start", *map(str, range(10))).status == 0


def test_shutdown_passes_its_limit(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Shutdown"] = {"name": "web1", "changed": True}
    for words in ((), ("--timeout", "2min"), ("--timeout=infinity",)):
        assert virtdctl("shutdown", "web1", *words).status == 0
    limits = [asked["timeout"] for asked in daemon.asked("Shutdown")]
    assert limits[0] is None  # the daemon's own
    assert 119 < limits[1] <= 120
    assert limits[2] > 1e8


def test_shutdown_that_takes_too_long(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Shutdown"] = errors.TimedOut("it still runs after 60 s")
    ran = virtdctl("shutdown", "web1")
    assert ran.status == 1
    assert ran.err.splitlines() == [
        "Failed to shut down web1: it still runs after 60 s",
        "Hint: the guest runs on; virtdctl stop web1 stops it at once",
    ]


def test_shutdown_without_waiting(virtdctl: Any, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtd.cli.domains.ASKED", 0.2)
    daemon.answers["Shutdown"] = lambda call: call.until(lambda: False) and None
    ran = virtdctl("shutdown", "--no-wait", "web1", "db1")
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    assert len(daemon.asked("Shutdown")) == 2
    daemon.answers["Shutdown"] = errors.InvalidState("web1 is stopped")
    assert virtdctl("shutdown", "--no-wait", "web1").status == 1


@pytest.mark.parametrize(
    ("words", "number"), [((), 15), (("-s", "KILL"), 9), (("--signal=sigusr1",), 10), (("-s", "2"), 2)]
)
def test_kill_takes_names_and_numbers(virtdctl: Any, daemon: FakeDaemon, words: tuple[str, ...], number: int) -> None:
    daemon.answers["Kill"] = {"name": "web1"}
    assert virtdctl("kill", "web1", *words).status == 0
    assert daemon.asked("Kill") == [{"name": "web1", "signal": number}]


def test_reboot_force(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Reboot"] = {"name": "web1", "changed": True}
    assert virtdctl("reboot", "--force", "web1").status == 0
    assert daemon.asked("Reboot") == [{"name": "web1", "force": True, "timeout": None}]
    daemon.answers["Reboot"] = errors.TimedOut("it still runs")
    assert "virtdctl reboot --force web1" in virtdctl("reboot", "web1").err


def test_autostart(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Autostart"] = {"name": "web1", "changed": True}
    assert virtdctl("autostart", "web1").status == 0
    assert virtdctl("autostart", "--disable", "web1").status == 0
    assert [asked["enable"] for asked in daemon.asked("Autostart")] == [True, False]


def test_access_denied_says_what_to_do(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Stop"] = errors.AccessDenied("alice may not stop domains")
    ran = virtdctl("stop", "web1")
    assert ran.status == 1
    assert ran.err == (
        "Failed to stop web1: alice may not stop domains\nHint: changing anything needs root: try it with sudo\n"
    )


def test_reload(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["Reload"] = {"changed": [], "problems": []}
    ran = virtdctl("reload")
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    daemon.answers["Reload"] = {"changed": ["web1", "db1"], "problems": [PROBLEM]}
    ran = virtdctl("reload")
    assert ran.status == 1
    assert ran.out == "Changed: web1, db1.\n"
    assert ran.err == "web1: a slot is missing\nHint: virtdctl stop web1\n"


# define.


def _defined(created: bool = True) -> dict[str, Any]:
    return {"name": "web1", "uuid": DOMAIN["uuid"], "created": created, "path": "/etc/virtd/qemu/web1.toml"}


def test_define_a_file(virtdctl: Any, daemon: FakeDaemon, tmp_path: Path) -> None:
    file = tmp_path / "web1.toml"
    file.write_text('name = "wéb1"')
    daemon.answers["Define"] = _defined()
    assert virtdctl("define", str(file)).out == "Defined web1 (/etc/virtd/qemu/web1.toml).\n"
    assert daemon.asked("Define") == [{"text": 'name = "wéb1"', "source": str(file), "check": False}]
    daemon.answers["Define"] = _defined(created=False)
    assert virtdctl("define", str(file)).out == "Changed the definition of web1 (/etc/virtd/qemu/web1.toml).\n"
    daemon.answers["Define"] = _defined(created=False) | {"warnings": ["disk[0].path: there is no such file"]}
    ran = virtdctl("define", "--check", str(file))
    assert ran.status == 0
    assert ran.out == f"{file}: OK, would change web1.\n"
    assert ran.err == f"{file}: warning: disk[0].path: there is no such file\n"
    assert daemon.asked("Define")[-1]["check"] is True


def test_define_standard_input(virtdctl: Any, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'name = "web1"')))
    daemon.answers["Define"] = errors.InvalidDefinition(
        "<stdin>", "memory", "at least 1M, not 0", hint='memory = "256M"'
    )
    ran = virtdctl("define", "-")
    assert ran.status == 1
    assert ran.err == '<stdin>: memory: at least 1M, not 0\nHint: memory = "256M"\n'
    assert daemon.asked("Define")[0]["source"] == "<stdin>"


def test_define_what_cant_be_read(virtdctl: Any, daemon: FakeDaemon, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"name\xff")
    ran = virtdctl("define", str(tmp_path / "none"), str(binary), str(tmp_path))
    assert ran.status == 1
    assert ran.err.splitlines() == [
        f"Failed to define {tmp_path}/none: Can't read it: No such file or directory",
        f"{binary}: UTF-8 text expected, but byte 4 isn't",
        f"Failed to define {tmp_path}: Can't read it: Is a directory",
    ]
    assert daemon.calls == []


# Daemons of another version, and none.


def test_a_daemon_that_doesnt_know_a_command(virtdctl: Any, daemon: FakeDaemon) -> None:
    ran = virtdctl("list")
    assert ran.status == 1
    assert ran.err.startswith("Failed to list domains: The running virtd doesn't know org.virtd1.List\nHint: ")


def test_an_error_of_a_newer_daemon(virtdctl: Any, daemon: FakeDaemon) -> None:
    class Newer(errors.VirtdError):
        pass

    daemon.answers["Stop"] = Newer("something new is wrong", hint="read the news")
    assert virtdctl("stop", "web1").err == "Failed to stop web1: something new is wrong\nHint: read the news\n"


def test_nonsense_instead_of_an_answer(virtdctl: Any, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = lambda call: call.connection.sendall(b"[]\0")
    ran = virtdctl("list")
    assert ran.status == 1
    assert "isn't a Varlink message" in ran.err


def test_a_socket_that_one_may_not_use(virtdctl: Any, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_address: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("virtd.cli.client.Connection", connect)
    assert virtdctl("start", "web1").err.startswith(f"Failed to start web1: No access to {daemon.path}\n")


# Output.


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (185, "3min 5s"),
        (3600, "1h"),
        (7503, "2h 5min"),
        (86400 + 7200, "1 day 2h"),
        (2 * 86400 + 60, "2 days"),
        (8 * 86400, "1 week 1 day"),
        (35 * 86400, "1 month 4 days"),
        (800 * 86400, "2 years 2 months"),
    ],
)
def test_span(seconds: float, text: str) -> None:
    assert output.span(seconds) == text


@pytest.mark.parametrize("when", [0, 951782400, 951868799, 1583020800, 1709164800, 1795402074, 4107542400])
def test_times_are_read_as_the_library_reads_them(when: int) -> None:
    assert output.seconds(time.strftime("%Y-%m-%dT%H:%M:%S.250000Z", time.gmtime(when))) == when + 0.25


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11", None])
def test_what_is_no_time_is_none(text: Any) -> None:
    assert output.seconds(text) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.paint("x", output.RED, Terminal()) == "\x1b[1;31mx\x1b[0m"
    assert output.paint("x", output.RED, io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("x", output.RED, Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert output.paint("x", output.RED, Terminal()) == "x"


def test_the_help_fits_a_terminal(virtdctl: Any) -> None:
    assert max(map(len, virtdctl("--help").out.splitlines())) <= 80
