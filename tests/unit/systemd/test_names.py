# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names of units, D-Bus paths and mount names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtd.systemd import names


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("", "_"),
        ("web1", "web1"),
        ("1web", "_31web"),
        ("virtd-qemu-a_b.service", "virtd_2dqemu_2da_5fb_2eservice"),
        ("ü", "_c3_bc"),
    ],
)
def test_labels_are_escaped_as_systemd_does(text: str, label: str) -> None:
    assert names.escape_label(text) == label
    assert names.unescape_label(label) == text


@given(st.text())
def test_escaping_has_an_inverse(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    label = names.escape_label(text)
    assert names.unescape_label(label) == text
    assert label.replace("_", "a").isalnum()
    assert label.isascii()


@pytest.mark.parametrize("label", ["", "a-b", "_4", "a_62", "_c3", "web1 ", "_2D", "a_"])
def test_what_escaping_can_not_have_made(label: str) -> None:
    with pytest.raises(ValueError, match="not an escaped name"):
        names.unescape_label(label)


def test_object_path() -> None:
    assert names.object_path("a.service") == "/org/freedesktop/systemd1/unit/a_2eservice"


@given(st.text("abcXYZ019._-", min_size=1, max_size=64))
def test_unit_names_have_an_inverse(name: str) -> None:
    unit = names.unit_name("qemu", name)
    assert unit == f"virtd-qemu-{name}.service"
    assert names.object_name("qemu", unit) == name
    assert names.object_name("lxc", unit) is None


@given(st.text("abcXYZ019._-", min_size=1, max_size=64))
def test_units_of_helpers_are_no_objects(name: str) -> None:
    unit = names.helper_unit("qemu", name, "tpm")
    assert unit == f"virtd-qemu-{name}@tpm.service"
    assert names.helped("qemu", "tpm", unit) == name
    assert names.object_name("qemu", unit) is None
    assert names.helped("qemu", "tpm", names.unit_name("qemu", name)) is None
    assert names.helped("qemu", "gpu", unit) is None
    assert names.helped("lxc", "tpm", unit) is None


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "ü", "a b", "x" * 300, "a\n"])
def test_what_can_be_no_unit(name: str) -> None:
    with pytest.raises(ValueError, match="can't be part of a unit's name"):
        names.unit_name("qemu", name)


@pytest.mark.parametrize(
    "unit", ["virtd.service", "virtd-qemu-.service", "virtd-qemu-a.scope", "xvirtd-qemu-a.service"]
)
def test_other_units_are_no_objects(unit: str) -> None:
    assert names.object_name("qemu", unit) is None


def test_mounts_that_a_path_may_be_on() -> None:
    assert names.mount_units("/srv/vm images/.a-b/disk.raw") == [
        "srv.mount",
        "srv-vm\\x20images.mount",
        "srv-vm\\x20images-.a\\x2db.mount",
    ]
    assert names.mount_units("/.hidden/disk.raw") == ["\\x2ehidden.mount"]
    assert names.mount_units("/disk.raw") == []


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/srv/pool", "srv-pool.mount"),
        ("/srv/my-pool/.x", "srv-my\\x2dpool-.x.mount"),
        ("/.a b", "\\x2ea\\x20b.mount"),
        ("/", "-.mount"),
    ],
)
def test_mount_units(path: str, unit: str) -> None:
    assert names.mount_unit(path) == unit  # as systemd-escape --path --suffix=mount has it
