# SPDX-License-Identifier: LGPL-2.1-or-later
"""Containers: definitions, checks of the host, LXC's configuration, and how an end is judged."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.unit.guests.test_verdict import documented
from virtd import errors
from virtd.drivers.lxc import config, ends, first, links, prerequisites, sandbox
from virtd.guests.power import SHUTDOWN_GIVEN_UP
from virtd.guests.verdict import Request, deciding
from virtd.model import container as model
from virtd.model import domain as domains
from virtd.model.state import Cause, State
from virtd.systemd.state import CLD_EXITED, CLD_KILLED, UnitState

if TYPE_CHECKING:
    from pathlib import Path

BASE = 'name = "web1"\nrootfs = "/srv/web1"\n'


def parse(more: str = "", text: str = BASE) -> model.Container:
    return model.parse(text + more, "web1.toml")


# Definitions


def test_a_volume_as_its_root() -> None:
    found = model.parse('name = "a"\nrootfs = { pool = "default", volume = "web1" }\n', "a.toml")
    assert found.rootfs == model.Root("default", "web1")
    for pool, volume, key in (("../a", "b", "rootfs.pool"), ("a", "../b", "rootfs.volume")):
        with pytest.raises(errors.InvalidDefinition) as caught:
            model.parse(f'name = "a"\nrootfs = {{ pool = "{pool}", volume = "{volume}" }}\n', "a.toml")
        assert caught.value.key == key


def test_the_host_s_network_comes_with_the_host_s_sys() -> None:
    """A user namespace that doesn't own a network can't mount a /sys that shows it."""
    shared = config.text(parse('[[nic]]\nmode = "host"\n'), on_host(), [])
    assert "sys:mixed" not in shared
    assert "/sys sys none rbind,ro" in shared
    assert "sys:mixed" in config.text(parse(), on_host(), [])


def test_the_shortest_definition() -> None:
    found = parse()
    assert found.argv == ("/sbin/init",)
    assert not found.privileged
    assert found.terminal


def test_the_longest_definition() -> None:
    found = parse(
        'command = ["/bin/sh", "-c", "exit 3"]\nhostname = "www"\nautostart = true\n'
        'shutdown_signal = "SIGRTMIN+4"\n'
        'drop_capabilities = ["net_raw"]\n[environment]\nLANG = "C"\n[idmap]\nfirst = 1000000\n'
        '[limits]\nmemory = "64M"\ncpus = 1.5\npids = 50\n'
        '[[mount]]\nsource = "/srv"\ntarget = "/mnt"\nreadonly = true\n'
        '[[device]]\npath = "/dev/fuse"\n[[nic]]\nnetwork = "default"\nmac = "52:54:00:00:00:01"\n'
    )
    assert found.argv[0] == "/bin/sh"
    assert found.limits.memory_bytes == 64 << 20
    assert found.idmap == model.IdMap(1000000, 65536)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ('init = "sbin/init"\n', "init"),
        ('init = "/sbin/my init"\n', "init"),
        ('init = "/sbin/init"\ncommand = ["true"]\n', "command"),
        ('command = [""]\n', "command[0]"),
        ('hostname = "a b"\n', "hostname"),
        ('shutdown_signal = "TERM"\n', "shutdown_signal"),
        ('drop_capabilities = ["CAP_SYS_ADMIN"]\n', "drop_capabilities[0]"),
        ('[environment]\n"A-B" = "x"\n', "environment.A-B"),
        ('[environment]\nA = "x\\ny"\n', "environment.A"),
        ("privileged = true\n[idmap]\nfirst = 1000000\n", "idmap"),
        ("[idmap]\nfirst = 4294967290\n", "idmap.count"),
        ("[idmap]\nfirst = 0\n", "idmap.first"),
        ('[limits]\nmemory = "lots"\n', "limits.memory"),
        ('[limits]\nmemory = "1K"\n', "limits.memory"),
        ("[limits]\ncpus = 0\n", "limits.cpus"),
        ("[limits]\npids = 0\n", "limits.pids"),
        ('[[mount]]\nsource = "srv"\ntarget = "/mnt"\n', "mount[0].source"),
        ('[[mount]]\nsource = "/srv"\ntarget = "/mnt/../etc"\n', "mount[0].target"),
        ('[[mount]]\nsource = "/srv"\ntarget = "/"\n', "mount[0].target"),
        ('[[mount]]\nsource = "/a"\ntarget = "/m"\n[[mount]]\nsource = "/b"\ntarget = "/m/"\n', "mount[1].target"),
        ('[[device]]\npath = "/etc/passwd"\n', "device[0].path"),
        ("[[nic]]\n", "nic[0].network"),
        ('[[nic]]\nmode = "bridge"\n', "nic[0].mode"),
        ('[[nic]]\nmode = "host"\n[[nic]]\nnetwork = "default"\n', "nic[0].mode"),
        ('[[nic]]\nnetwork = "default"\nmac = "01:00:00:00:00:01"\n', "nic[0].mac"),
        ('[[nic]]\nnetwork = "default"\nname = "lo"\n', "nic[0].name"),
        ('[[nic]]\nnetwork = "a"\nname = "x"\n[[nic]]\nnetwork = "a"\nname = "x"\n', "nic[1].name"),
        ('memroy = "1G"\n', "memroy"),
    ],
)
def test_what_is_wrong_is_named(more: str, key: str) -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        parse(more)
    assert (caught.value.file, caught.value.key) == ("web1.toml", key)
    assert caught.value.expected


@pytest.mark.parametrize("rootfs", ["srv/x", "/", "/srv/../etc", "/srv/a:b", "/srv/a\\nlxc.hook.start = /bin/sh"])
def test_a_root_that_can_be_none(rootfs: str) -> None:
    with pytest.raises(errors.InvalidDefinition) as caught:
        parse(text=f'name = "web1"\nrootfs = "{rootfs}"\n')
    assert caught.value.key == "rootfs"


def test_apparmor_takes_a_kernel_that_has_it_and_a_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No host that runs these tests has either: only LXC's configuration can be checked."""
    enabled, parser = tmp_path / "enabled", tmp_path / "apparmor_parser"
    monkeypatch.setattr(prerequisites, "APPARMOR", str(enabled))
    monkeypatch.setattr(prerequisites, "PARSERS", (str(parser),))
    assert not prerequisites.apparmor()
    enabled.write_text("Y\n")
    assert not prerequisites.apparmor()
    parser.write_text("")
    parser.chmod(0o755)
    assert prerequisites.apparmor()
    enabled.write_text("N\n")
    assert not prerequisites.apparmor()
    assert "lxc.apparmor.profile = unconfined" in config.text(parse(), on_host(), [])
    assert "lxc.apparmor.profile = generated" in config.text(parse(), on_host(apparmor=True), [])


# The root file system


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for directory in ("usr/bin", "usr/lib/systemd", "etc"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "sbin").symlink_to("/usr/bin")
    for program in ("usr/bin/sh", "usr/lib/systemd/systemd"):
        (tmp_path / program).write_text("")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "usr/bin/init").symlink_to("../lib/systemd/systemd")
    return tmp_path


def test_links_are_followed_inside(root: Path) -> None:
    assert prerequisites.inside(str(root), "/sbin/init") == f"{root}/usr/lib/systemd/systemd"
    (root / "out").symlink_to("../../../../../../usr")
    assert prerequisites.inside(str(root), "/out/bin/sh") == f"{root}/usr/bin/sh"
    (root / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):
        prerequisites.inside(str(root), "/loop")


def test_a_root_with_its_program(root: Path) -> None:
    prerequisites.check_root(parse(), str(root), "x")
    prerequisites.check_root(parse('command = ["sh", "-c", "true"]\n'), str(root), "x")
    assert prerequisites.halt_signal(parse(), str(root)) == "SIGRTMIN+3"
    assert prerequisites.halt_signal(parse('command = ["sh"]\n'), str(root)) == "SIGTERM"
    assert prerequisites.halt_signal(parse('init = "/bin/sh"\n'), str(root)) == "SIGPWR"
    assert prerequisites.halt_signal(parse('shutdown_signal = "SIGINT"\n'), str(root)) == "SIGINT"


def test_what_a_mount_shows_is_looked_at(root: Path, tmp_path: Path) -> None:
    """A root file system whose programs are the host's own /usr."""
    thin = tmp_path / "thin"
    (thin / "etc").mkdir(parents=True)
    (thin / "bin").symlink_to("usr/bin")
    (thin / "sbin").symlink_to("/usr/bin")
    mount = f'[[mount]]\nsource = "{root}/usr/"\ntarget = "/usr/"\n'
    prerequisites.check_root(parse(f'command = ["sh"]\n{mount}'), str(thin), "x")
    prerequisites.check_root(parse(mount), str(thin), "x")
    assert prerequisites.halt_signal(parse(mount), str(thin)) == "SIGRTMIN+3"
    with pytest.raises(errors.InvalidDefinition, match="nothing"):
        prerequisites.check_root(parse(f'command = ["nothing"]\n{mount}'), str(thin), "x")
    with pytest.raises(errors.InvalidDefinition):
        prerequisites.check_root(parse('command = ["sh"]\n'), str(thin), "x")


def test_a_root_that_is_none(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (root / "usr/bin/plain").write_text("")
    for definition, where, key in (
        (parse(), str(tmp_path / "missing"), "rootfs"),
        (parse(), str(root / "usr/bin/sh"), "rootfs"),
        (parse(), str(tmp_path / "empty"), "rootfs"),
        (parse('init = "/sbin/nothing"\n'), str(root), "init"),
        (parse('init = "/bin/plain"\n'), str(root), "init"),
        (parse('command = ["nothing"]\n'), str(root), "command[0]"),
    ):
        with pytest.raises(errors.InvalidDefinition) as caught:
            prerequisites.check_root(definition, where, "x")
        assert caught.value.key == key


def test_mounts_and_devices_have_to_be_there(tmp_path: Path) -> None:
    mount = f'[[mount]]\nsource = "{tmp_path}/none"\ntarget = "/mnt"\n'
    with pytest.raises(errors.InvalidDefinition) as caught:
        prerequisites.check_host(parse(mount), "x")
    assert caught.value.key == "mount[0].source"
    with pytest.raises(errors.InvalidDefinition) as caught:
        prerequisites.check_host(parse('[[device]]\npath = "/dev/fd"\n'), "x")
    assert caught.value.key == "device[0].path"
    with pytest.raises(errors.InvalidDefinition, match="what the host has"):
        prerequisites.check_host(parse('[limits]\nmemory = "60T"\n'), "x")


# LXC's configuration


def on_host(**changes: object) -> config.HostFacts:
    usual: dict[str, object] = {
        "path": "/run/virtd/lxc",
        "runtime": "/run/virtd/lxc/web1",
        "root": "/srv/web1",
        "ids": model.IdMap(1000000),
        "shifted": False,
        "tty": "/dev/pts/3",
        "halt": "SIGPWR",
        "seccomp": "/usr/share/lxc/config/common.seccomp",
        "apparmor": False,
        "start": "/usr/bin/lxc-start",
    }
    return config.HostFacts(**(usual | changes))  # type: ignore[arg-type]


def test_the_configuration() -> None:
    text = config.text(parse('[[mount]]\nsource = "/srv/a b"\ntarget = "/mnt"\n'), on_host(), [])
    lines = text.splitlines()
    assert "lxc.idmap = u 0 1000000 65536" in lines
    assert "lxc.idmap = g 0 1000000 65536" in lines
    assert "lxc.net.0.type = empty" in lines
    assert "lxc.mount.entry = /dev/pts/3 dev/console none bind,create=file 0 0" in lines
    assert "lxc.mount.entry = /srv/a\\040b mnt none bind,create=file 0 0" in lines
    assert "lxc.seccomp.profile = /usr/share/lxc/config/common.seccomp" in lines
    assert "lxc.init.cmd = /sbin/init" in lines


def test_the_configuration_of_others() -> None:
    privileged = config.text(parse("privileged = true\n"), on_host(ids=None, tty="", apparmor=True), [])
    assert "idmap" not in privileged
    assert "dev/console" not in privileged
    assert "lxc.apparmor.profile = generated" in privileged
    assert "lxc.prlimit.nofile = 1024:524288" in privileged
    assert "rootfs.options = idmap=container" in config.text(parse(), on_host(shifted=True), [])
    assert "lxc.net.0.type = none" in config.text(parse('[[nic]]\nmode = "host"\n'), on_host(), [])
    link = config.Link("vl0.0", "virbr0", "eth0", "52:54:00:00:00:01")
    assert "lxc.net.0.link = virbr0" in config.text(parse(), on_host(), [link])


def test_a_command_is_quoted_for_the_shell() -> None:
    script = config.start_script(parse("""command = ["sh", "-c", "echo 'a b' $HOME"]\n"""), on_host())
    assert """'sh' '-c' 'echo '\\''a b'\\'' $HOME'""" in script


def test_an_unprivileged_one_gets_no_capability_of_the_host_that_it_needs_not() -> None:
    found = {
        name: value
        for name, _, value in sandbox.properties(
            parse(), on_host(), model.Limits(), toplevel=["usr", "home", "run"], stop_after=60
        )
    }
    assert ("/home", "ro,mode=0755") in found["TemporaryFileSystem"]
    assert not found["CapabilityBoundingSet"] & (1 << 16 | 1 << 17 | 1 << 22 | 1 << 25)  # module, rawio, boot, time
    assert found["DevicePolicy"] == "strict"
    assert "MemoryMax" not in found


@pytest.mark.parametrize(
    ("more", "hidden"),
    [
        ("", True),
        ('[[device]]\npath = "/dev/null"\n', False),
        ('[[mount]]\nsource = "/dev/net"\ntarget = "/dev/net"\n', False),
        ("privileged = true\n", False),
    ],
)
def test_the_hosts_devices_are_hidden_unless_it_is_given_some(more: str, *, hidden: bool) -> None:
    found = {
        name for name, _, _ in sandbox.properties(parse(more), on_host(), model.Limits(), toplevel=[], stop_after=60)
    }
    assert ("PrivateDevices" in found) is hidden


# Ends

LOG = "lxc-start web1 20261124035119.773 {level} start - ../src/lxc/start.c:post_start:2217 - {words}"


def log(words: str, level: str = "INFO    ") -> str:
    return LOG.format(level=level, words=words)


def unit(code: int = CLD_EXITED, status: int = 0, result: str = "success") -> UnitState:
    return UnitState(
        name="virtd-lxc-web1.service", load="loaded", active="active", sub="exited", result=result, main_pid=0,
        invocation_id="", exec_code=code, exec_status=status, exited_at=2.0, description="",
    )  # fmt: skip


def test_the_log_is_read_as_a_diary() -> None:
    assert ends.read(log("x", "WARN    ")) == ends.Said("warning", "x")
    assert ends.read(log("x", "ERROR   ")) == ends.Said("error", "x")
    assert ends.read(log("x")).level is None
    nothing = (
        "No such file or directory - Failed to fchownat(15, memory.oom.group, 65536, 0, AT_EMPTY_PATH | "
        "AT_SYMLINK_NOFOLLOW )"
    )
    assert ends.read(log(nothing, "WARN    ")) == ends.Said(None, nothing)
    assert ends.read(log(nothing.replace("No such", "No other"), "WARN    ")).level == "warning"
    assert ends.read("a line of something else").level == "warning"
    assert ends.started('Started "/sbin/init" with pid "243"') == 243
    assert ends.started("'sh' started with pid '578'") == 578
    assert ends.started("Started nothing") is None


def test_who_ended_counts() -> None:
    words = f"{log('Child <7> ended on error (3)')}\n{log('Child <9> ended on signal Killed(9)')}"
    assert ends.first(words, 7) == ends.First(3, None)
    assert ends.first(words, 9) == ends.First(None, 9)
    assert ends.first(words, 0) == ends.First(None, 9)
    assert ends.first(words, 8) is None
    assert ends.first(log("Child <7> ended on signal (2)"), 7) == ends.First(None, 2)  # LXC 5


OFF, BAD = State.STOPPED, State.CRASHED
ASKED = {verb: Request(verb, "root", "") for verb in ("stop", "shutdown", "kill", SHUTDOWN_GIVEN_UP)}


ENDS: list[tuple[UnitState | None, str, str | None, bool, bool, State, Cause, int | None, str | None]] = [
    (unit(), "signal Interrupt(2)", None, False, False, OFF, Cause.GUEST_SHUTDOWN, None, None),
    (unit(), "signal Interrupt(2)", "shutdown", False, False, OFF, Cause.SHUTDOWN, None, None),
    (unit(), "signal Interrupt(2)", SHUTDOWN_GIVEN_UP, False, False, OFF, Cause.GUEST_SHUTDOWN, None, None),
    (unit(), "signal Interrupt(2)", None, False, True, OFF, Cause.HOST_SHUTDOWN, None, None),
    (unit(result="timeout"), "signal Interrupt(2)", None, False, True, OFF, Cause.HOST_SHUTDOWN, None, None),
    (unit(), "signal Hangup(1)", None, False, False, OFF, Cause.GUEST_SHUTDOWN, None, None),
    (unit(), "signal Killed(9)", "stop", False, False, OFF, Cause.STOP, None, "SIGKILL"),
    (unit(), "signal Killed(9)", None, False, False, BAD, Cause.KILLED, None, "SIGKILL"),
    (unit(), "signal Killed(9)", "kill", False, False, BAD, Cause.KILLED, None, "SIGKILL"),
    (unit(), "error (3)", None, True, False, BAD, Cause.FAILED, 3, None),
    (unit(status=3), "", None, True, False, BAD, Cause.FAILED, 3, None),
    (unit(), "", None, True, False, OFF, Cause.EXITED, 0, None),
    (unit(), "Child <6> ended on error (3)", None, True, False, OFF, Cause.EXITED, 0, None),
    (unit(CLD_KILLED, 9, "signal"), "", None, False, False, BAD, Cause.KILLED, None, "SIGKILL"),
    (unit(CLD_KILLED, 9, "oom-kill"), "", None, False, False, BAD, Cause.OOM, None, "SIGKILL"),
    (None, "", None, False, False, BAD, Cause.UNKNOWN, None, None),
]  # fmt: skip


def said(words: str) -> str:
    return log(words if not words or words.startswith("Child") else f"Child <7> ended on {words}")


@pytest.mark.parametrize(("state_of", "words", "asked", "command", "down", "state", "cause", "code", "signal"), ENDS)
def test_why_it_ended(
    state_of: UnitState | None, words: str, asked: str | None, command: bool, down: bool,
    state: State, cause: Cause, code: int | None, signal: str | None,
) -> None:  # fmt: skip
    request = ASKED[asked] if asked else None
    end = ends.judge(ends.evidence(state_of, said(words), 7, request, command=command, host_down=down, seen="later"))
    assert (end.state, end.exit.cause, end.exit.code, end.exit.signal) == (state, cause.value, code, signal)
    assert end.exit.by == ("root" if end.exit.cause in ("stop", "shutdown", "killed") and asked else None)


def test_every_rule_decides_one_of_the_examples() -> None:
    decided = [
        deciding(
            ends.RULES,
            ends.evidence(
                state_of,
                said(words),
                7,
                ASKED[asked] if asked else None,
                command=command,
                host_down=down,
                seen="later",
            ),
        ).name
        for state_of, words, asked, command, down, *_ in ENDS
    ]
    names = [rule.name for rule in ends.RULES]
    assert set(decided) == set(names)
    assert len(set(names)) == len(names)


def test_the_documented_rules_are_those_of_the_code() -> None:
    assert documented("containers.md") == [(rule.name, rule.state.value, rule.cause.value) for rule in ends.RULES]


def test_what_a_failed_start_was_about() -> None:
    words = f"{log('fine')}\n{log('No such file', 'ERROR   ')}\nsomething else"
    assert ends.errors_in(words) == ["No such file"]


# Small things


def test_signals_by_name() -> None:
    import signal

    assert first.number_of("SIGRTMIN+3") == signal.SIGRTMIN + 3
    assert first.number_of("SIGTERM") == 15
    with pytest.raises(errors.InvalidState):
        first.number_of("SIGNOTHING")


def test_addresses_come_from_the_kernel() -> None:
    assert links.addresses("/nonexistent") == []
    assert not any(address.startswith("127.") for address in links.addresses(f"/proc/{os.getpid()}/net"))


def test_names_of_interfaces_are_short_and_its_own() -> None:
    names = links.interface_names("7429a786-a9dc-4fdb-8246-3a60296f6f46", 12)
    assert len(set(names)) == 12
    assert all(len(name) <= 15 for name in names)
    assert links.mac_of("7429a786", 0) != links.mac_of("7429a786", 1)


def test_a_mount_that_others_could_exchange_is_refused(tmp_path: Path) -> None:
    """Others could make the container get something else of the host's."""
    (tmp_path / "open/data").mkdir(parents=True)
    definition = parse(f'[[mount]]\nsource = "{tmp_path}/open/data"\ntarget = "/mnt"\n')
    prerequisites.check_host(definition, "x")
    assert prerequisites.missing(definition) == []
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(errors.InvalidDefinition, match="could replace data") as caught:
        prerequisites.check_host(definition, "x")
    assert caught.value.key == "mount[0].source"
    assert "chmod o-w" in str(caught.value.hint)
    ((key, _text),) = prerequisites.missing(definition)
    assert key == "mount[0].source"


@pytest.mark.parametrize("ending", [".console", ".json", ".creating"])
def test_no_name_is_another_ones_file(ending: str) -> None:
    with pytest.raises(errors.InvalidDefinition, match="name: expected a name that doesn't end in"):
        model.parse(f'name = "web1{ending}"\nrootfs = "/srv/web1"\n', "web1.toml")
    with pytest.raises(errors.InvalidDefinition, match="name: expected a name that doesn't end in"):
        domains.parse(f'name = "web1{ending}"\nmemory = "1G"\n[boot]\nkernel = "/vmlinuz"\n', "web1.toml")
