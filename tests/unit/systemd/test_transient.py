# SPDX-License-Identifier: LGPL-2.1-or-later
"""What transient units are made of."""

from __future__ import annotations

import os

from virtd.systemd.bus import Var
from virtd.systemd.transient import Stdio, UnitSpec, transient_properties

NO_STDIO = (os.devnull, os.devnull, os.devnull)


def properties_of(spec: UnitSpec, stdio: tuple[Stdio, Stdio, Stdio], version: int) -> dict[str, Var]:
    return {key: Var(signature, value) for key, signature, value in transient_properties(spec, stdio, version)}


def test_what_a_unit_is_made_of() -> None:
    spec = UnitSpec(
        name="u.service",
        description="a guest",
        slice="virtd-qemu.slice",
        argv=("/bin/x", "-y"),
        environment=(("A", "b=c d"),),
        user="virtd-qemu",
        supplementary_groups=("kvm",),
        properties=(("NoNewPrivileges", "b", True),),
    )
    properties = properties_of(spec, ("/run/in", 7, 8), 257)
    assert properties["ExecStart"] == Var("a(sasb)", [("/bin/x", ["/bin/x", "-y"], False)])
    assert properties["Environment"] == Var("as", ["A=b=c d"])
    assert properties["RemainAfterExit"] == Var("b", True)
    assert properties["StandardInputFile"] == Var("s", "/run/in")
    assert properties["StandardOutputFileDescriptor"] == Var("h", 0)
    assert properties["StandardErrorFileDescriptor"] == Var("h", 1)
    assert properties["User"] == Var("s", "virtd-qemu")
    assert properties["SupplementaryGroups"] == Var("as", ["kvm"])
    assert properties["NoNewPrivileges"] == Var("b", True)
    # systemd takes an empty group for a wish, too.
    assert "Group" not in properties


def test_standard_streams_can_be_words() -> None:
    properties = properties_of(UnitSpec("u.service", "a TPM", "s.slice", ("/x",)), (7, "null", "journal"), 257)
    assert properties["StandardInputFileDescriptor"] == Var("h", 0)
    assert properties["StandardOutput"] == Var("s", "null")
    assert properties["StandardError"] == Var("s", "journal")


def test_a_unit_lives_through_a_soft_reboot_where_there_are_any() -> None:
    spec = UnitSpec("u.service", "a guest", "virtd-qemu.slice", ("/bin/x",), after=("srv-vm.mount",))
    old, new = (properties_of(spec, NO_STDIO, version) for version in (252, 255))
    assert new["SurviveFinalKillSignal"] == Var("b", True)
    assert "SurviveFinalKillSignal" not in old  # systemd refuses what it doesn't know
    for properties in (old, new):
        assert properties["DefaultDependencies"] == Var("b", False)
        assert "poweroff.target" in properties["Conflicts"].value
        assert properties["After"] == Var("as", ["virtd-guests-pre.target", "srv-vm.mount"])
        assert "virtd-guests-pre.target" not in properties["Before"].value
    ground = properties_of(UnitSpec("n.service", "a network", "s.slice", ("/x",), ground=True), NO_STDIO, 255)
    assert "virtd-guests-pre.target" in ground["Before"].value
    assert ground["After"] == Var("as", [])
