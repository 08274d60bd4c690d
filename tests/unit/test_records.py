# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records: written whole, read in whatever shape they are found."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtd import errors
from virtd.paths import Paths
from virtd.records import Exit, Record, Records, decode, encode, stamp

FULL = Record(
    driver="qemu",
    name="web1",
    uuid="0123abcd-4567-89ab-cdef-0123456789ab",
    state="running",
    reason="started by root",
    since="2026-01-01T00:00:00.000000Z",
    id=3,
    unit="virtd-qemu-web1.service",
    invocation_id="ab" * 16,
    main_pid=4711,
    main_start=123456,
    boot_id="cd" * 16,
    slots={"qemu/web1/stdin": "13:42"},
    data={"definition": "name = 'web1'", "request": None},
    exit=Exit(cause="killed", at="2026-01-01T00:00:00.000000Z", signal="SIGKILL", by="root"),
)


@pytest.fixture
def store(tmp_path: Path) -> Records:
    return Records(Paths(str(tmp_path)), "qemu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run/virtd/qemu/web1.json"
    path.parent.mkdir(parents=True)
    return path


def test_round_trip(store: Records, tmp_path: Path) -> None:
    store.save(FULL)
    loaded = store.load()
    assert loaded.records == {"web1": FULL}
    assert loaded.quarantined == []
    path = tmp_path / "run/virtd/qemu/web1.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_bytes())["schema"] == 1
    store.remove("web1")
    store.remove("web1")
    assert store.load().records == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
TEXT = st.text(max_size=20)


@given(
    st.builds(
        Record,
        driver=TEXT,
        name=TEXT,
        uuid=TEXT,
        state=TEXT,
        reason=TEXT,
        since=TEXT,
        schema=st.integers(0, 1 << 31),
        main_pid=st.integers(0, 1 << 22),
        slots=st.dictionaries(TEXT, TEXT, max_size=5),
        data=st.dictionaries(TEXT, JSON, max_size=5),
        exit=st.none()
        | st.builds(Exit, cause=TEXT, at=TEXT, code=st.none() | st.integers(0, 255), signal=st.none() | TEXT),
        unknown=st.dictionaries(TEXT.filter(lambda key: key not in Record.__struct_fields__), JSON, max_size=3),
    )
)
def test_any_record_comes_back(record: Record) -> None:
    assert decode(encode(record)) == record


def test_an_older_daemon_keeps_what_a_newer_one_wrote(store: Records, path: Path) -> None:
    table = json.loads(encode(FULL)) | {"schema": 7, "migration": {"to": ["b"], "unknown": 1}, "unknown": "a field"}
    path.write_text(json.dumps(table))
    record = store.load().records["web1"]
    assert (record.schema, record.main_pid) == (7, 4711)
    store.save(msgspec.structs.replace(record, state="stopped"))
    assert json.loads(path.read_bytes()) == table | {"state": "stopped"}


def test_a_newer_daemon_reads_the_oldest_record(path: Path, store: Records) -> None:
    keys = ("driver", "name", "uuid", "state", "reason", "since")
    path.write_text(json.dumps({key: getattr(FULL, key) for key in keys}))
    record = store.load().records["web1"]
    assert (record.schema, record.slots, record.data, record.exit) == (1, {}, {}, None)


def test_cut_short_at_every_byte(store: Records, path: Path, tmp_path: Path) -> None:
    whole = encode(FULL)
    for length in range(len(whole) - 1):
        if whole[length:].strip() == b"":
            continue
        path.write_bytes(whole[:length])
        loaded = store.load()
        assert loaded.records == {}
        (bad,) = loaded.quarantined
        assert (bad.driver, bad.name, bad.path) == ("qemu", "web1", str(path))
        assert bad.reason
        assert not path.exists()
        moved = Path(bad.moved_to)
        assert moved.parent == tmp_path / "run/virtd/quarantine"
        assert moved.read_bytes() == whole[:length]
        moved.unlink()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b"\0" * 100,
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{}",
        encode(FULL).replace(b"4711", b'"4711"'),
        encode(FULL).replace(b"4711", b"-1e400"),
        encode(FULL).replace(b'"web1"', b"null"),
        encode(FULL).replace(b'"killed"', b"7"),
    ],
)
def test_nonsense_is_put_aside(store: Records, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    other = msgspec.structs.replace(FULL, name="web2")
    store.save(other)
    loaded = store.load()
    assert loaded.records == {"web2": other}
    assert [bad.name for bad in loaded.quarantined] == ["web1"]
    # Once: the next start doesn't meet it again.
    assert store.load().quarantined == []


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_reason(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(decode(raw), Record)


@pytest.mark.parametrize("change", [{"name": "web2"}, {"driver": "lxc"}])
def test_a_record_under_another_name(store: Records, path: Path, change: dict[str, Any]) -> None:
    path.write_bytes(encode(msgspec.structs.replace(FULL, **change)))
    loaded = store.load()
    assert loaded.records == {}
    assert "it names" in loaded.quarantined[0].reason


def test_what_is_no_file_is_put_aside(store: Records, path: Path) -> None:
    path.mkdir()
    assert [bad.name for bad in store.load().quarantined] == ["web1"]
    path.symlink_to("nowhere")
    assert [bad.name for bad in store.load().quarantined] == ["web1"]


def test_a_quarantine_that_cannot_be(store: Records, path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"{")
    (tmp_path / "run/virtd/quarantine").touch()
    (bad,) = store.load().quarantined
    assert bad.moved_to == bad.path == str(path)
    assert "not moved" in bad.reason


def test_half_written_files_are_not_read(store: Records, path: Path) -> None:
    store.save(FULL)
    path.with_name(".web2.json.new").write_bytes(b"{")
    loaded = store.load()
    assert list(loaded.records) == ["web1"]
    assert loaded.quarantined == []


def test_no_directory_yet(store: Records) -> None:
    assert store.load().records == {}


def test_a_full_file_system_keeps_the_old_record(store: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(FULL)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(errors.HostError, match="No space left") as caught:
            store.save(msgspec.structs.replace(FULL, state="stopped"))
    assert "free some space" in str(caught.value.hint)
    assert store.load().records == {"web1": FULL}


def test_stamps_are_utc_with_microseconds() -> None:
    assert stamp(0) == "1970-01-01T00:00:00.000000Z"
    assert stamp(1.25) == "1970-01-01T00:00:01.250000Z"
