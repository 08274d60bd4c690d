# SPDX-License-Identifier: LGPL-2.1-or-later
"""The IDs of containers: whole ranges, none shared, however a container gets its own."""

from __future__ import annotations

import asyncio
import itertools
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.doubles.whole_host import ROOT, on_loop
from tests.unit.drivers.lxc.test_container_restarts import Site
from virtd import errors
from virtd.drivers import ids
from virtd.drivers.lxc import grants, idmaps
from virtd.model import container as model

if TYPE_CHECKING:
    from pathlib import Path

FIRST = ids.CONTAINERS.first


def grant(etc: Path, subuid: str, subgid: str | None = None) -> str:
    (etc / "subuid").write_text(subuid)
    (etc / "subgid").write_text(subuid if subgid is None else subgid)
    return str(etc)


class Containers(dict[str, Any]):
    """Containers of the driver, each with a root of its own."""

    def __init__(self, directory: Path, etc: str) -> None:
        self.directory = directory / "roots"
        self.directory.mkdir()
        self.etc = etc
        self.table = str(directory / "lxc-ids.json")
        self.again()

    def again(self) -> None:
        """What a new daemon finds."""
        self.maps = idmaps.Maps(self, str(self.directory), self.table, etc=self.etc)

    def parsed(self, name: str, more: str = "", root: str = "") -> model.Container:
        place = self.directory / (root or name)
        place.mkdir(exist_ok=True)
        return model.parse(f'name = "{name}"\nrootfs = "{place}"\n{more}', name)

    def define(self, name: str, more: str = "", root: str = "") -> Any:
        definition = self.parsed(name, more, root)
        self[name] = SimpleNamespace(
            name=name, uuid=f"uuid of {name}", definition=definition, running_definition=definition, alive=False,
            record=None,
        )  # fmt: skip
        return self[name]

    def start(self, name: str) -> model.IdMap:
        one = self[name]
        root = one.definition.rootfs
        found, _ = self.maps.reserve(one, one.definition, root, name)
        assert found is not None
        one.alive, one.record = True, SimpleNamespace(data={"ids": [found.first, found.count]})
        self.maps.release(name)
        return found

    def stop(self, name: str) -> None:
        self[name].alive, self[name].record = False, None


@pytest.fixture
def containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Containers:
    found = Containers(tmp_path, grant(tmp_path, ""))
    # Whoever runs the tests: the files are root's, unless a test says otherwise.
    real, owners = os.stat, found.__dict__.setdefault("owners", {})

    def owned(path: str, **options: bool) -> Any:
        status = real(path, **options)
        return SimpleNamespace(st_uid=owners.get(os.path.basename(path), 0), st_mode=status.st_mode)

    monkeypatch.setattr(idmaps, "os", SimpleNamespace(
        stat=owned, lstat=lambda path: owned(path, follow_symlinks=False), path=os.path,
        scandir=os.scandir,
    ))  # fmt: skip
    monkeypatch.setattr(idmaps, "_owners", lambda directory: [
        (f"{directory}/{name}", owner) for name, owner in owners.items()
    ])  # fmt: skip
    return found


def disjoint(found: list[model.IdMap]) -> bool:
    pairs = itertools.combinations(found, 2)
    return not any(ids.Range("", *_plain(one)).meets(*_plain(other)) for one, other in pairs)


def _plain(one: model.IdMap) -> tuple[int, int]:
    return one.first, one.count


def test_without_a_grant_the_upper_range_is_ours(tmp_path: Path) -> None:
    etc = grant(tmp_path, "alice:100000:65536\n")
    grants.check(model.IdMap(FIRST), "x", etc=etc)
    with pytest.raises(errors.InvalidDefinition) as caught:
        grants.check(model.IdMap(100000), "x", etc=etc)
    assert caught.value.key == "idmap"
    assert "root:100000:65536" in str(caught.value.hint)


def test_what_root_is_granted_counts(tmp_path: Path, containers: Containers) -> None:
    etc = grant(tmp_path, "root:1000000:131072\n# a remark\nbroken:x:y\n")
    assert containers.maps.reserve_new("a").first == 1000000
    assert containers.maps.reserve_new("b").first == 1065536
    with pytest.raises(errors.HostError):
        containers.maps.reserve_new("c")
    containers.maps.release("a")
    assert containers.maps.reserve_new("c").first == 1000000
    with pytest.raises(errors.InvalidDefinition):
        grants.check(model.IdMap(FIRST), "x", etc=etc)
    with pytest.raises(errors.InvalidDefinition):
        grants.check(model.IdMap(1000000, 131073), "x", etc=etc)


def test_ids_that_somebody_else_has_are_refused(tmp_path: Path, containers: Containers) -> None:
    etc = grant(tmp_path, "root:100000:1000000\nalice:165536:65536\n")
    with pytest.raises(errors.InvalidDefinition, match="alice"):
        grants.check(model.IdMap(165536), "x", etc=etc)
    (tmp_path / "passwd").write_text("root:x:0:0::/:\nbob:x:231072:1::/:\nodd:x:²:\n")
    (tmp_path / "group").write_text("staff:x:296608:\n")
    with pytest.raises(errors.InvalidDefinition, match="user bob"):
        grants.check(model.IdMap(231072), "x", etc=etc)
    with pytest.raises(errors.InvalidDefinition, match="group staff"):
        grants.check(model.IdMap(296608), "x", etc=etc)
    # 100000 and what comes after are free, then alice's, bob's, staff's.
    assert [containers.maps.reserve_new(name).first for name in "ab"] == [100000, 362144]


def test_guests_are_somebody_else(tmp_path: Path) -> None:
    etc = grant(tmp_path, f"root:{ids.GUESTS.first}:{ids.GUESTS.many}\n")
    with pytest.raises(errors.InvalidDefinition, match="guests"):
        grants.check(model.IdMap(ids.GUESTS.first, 10), "x", etc=etc)


def test_groups_count_as_well(tmp_path: Path) -> None:
    etc = grant(tmp_path, "root:1000000:65536\n", "root:2000000:65536\n")
    with pytest.raises(errors.InvalidDefinition, match="subgid"):
        grants.check(model.IdMap(1000000), "x", etc=etc)


def test_whole_ranges_count(containers: Containers) -> None:
    """A range of twice the usual size reaches into the next one."""
    containers.define("wide", f"[idmap]\nfirst = {FIRST}\ncount = 131072\n")
    containers.define("odd", f"[idmap]\nfirst = {FIRST + 131072 + 7}\ncount = 3\n")
    for name in ("wide", "a", "odd", "b", "c"):
        if name not in containers:
            containers.define(name)
    found = [containers.start(name) for name in ("a", "wide", "b", "odd", "c")]
    assert disjoint(found), found
    for first, count in ((FIRST + 131071, 1), (FIRST + 65536, 65536), (FIRST - 0, 1), (FIRST + 131072, 65536)):
        with pytest.raises(errors.InvalidDefinition, match=r"container (wide|odd) has some"):
            containers.maps.check(containers.parsed("new", f"[idmap]\nfirst = {first}\ncount = {count}\n"), "new")


def test_a_range_is_taken_before_anybody_else_looks(containers: Containers) -> None:
    """Four are started at once, before any has a record, and one is made meanwhile."""
    found = []
    for name in ("a", "b", "c", "d"):
        one = containers.define(name)
        ids_, shifted = containers.maps.reserve(one, one.definition, one.definition.rootfs, name)
        assert ids_ is not None
        assert shifted
        found.append(ids_)
    found.append(containers.maps.reserve_new("made"))
    assert disjoint(found)


def test_it_stays_its_own(containers: Containers) -> None:
    """Beyond its end and the daemon's: what it has left in a [[mount]] never becomes another container's."""
    for name in ("a", "b"):
        containers.define(name)
    first, second = containers.start("a"), containers.start("b")
    containers.stop("a")
    containers.again()
    containers.define("c")
    assert disjoint([containers.start("c"), first, second])
    assert containers.start("a") == first
    with open(containers.table, "w") as file:
        file.write("{damaged")
    containers.again()
    containers.stop("b")
    assert disjoint([containers.start("b"), first])


def test_owners_of_files_have_their_ids(containers: Containers) -> None:
    """A root file system that belongs to a container's own root, whether or not there is a definition."""
    owners: dict[str, int] = containers.__dict__["owners"]
    owners |= {"a": FIRST, "orphan": FIRST + 65536}
    containers.define("a")
    containers.define("b")
    assert containers.start("b").first == FIRST + 131072
    assert containers.start("a").first == FIRST
    with pytest.raises(errors.InvalidDefinition, match="container a"):
        containers.maps.check(containers.parsed("c", f"[idmap]\nfirst = {FIRST + 9}\ncount = 1\n"), "c")
    containers.define("c", f"[idmap]\nfirst = {FIRST + 9 * 65536}\n")
    owners["c"] = 7
    with pytest.raises(errors.InvalidDefinition, match="to whom"):
        containers.start("c")


def test_two_with_one_root_share_its_ids(containers: Containers) -> None:
    owners: dict[str, int] = containers.__dict__["owners"]
    owners["both"] = FIRST
    for name in ("a", "b"):
        containers.maps.check(containers.parsed(name, root="both"), name)
        containers.define(name, root="both")
    assert containers.start("a") == containers.start("b")
    assert containers.maps.overlaps() == {}


def test_those_that_overlap_already_are_told_of(containers: Containers) -> None:
    """And they run on; but none is started while another with the same IDs runs."""
    for name in ("a", "b"):
        containers.define(name, f"[idmap]\nfirst = {FIRST}\n")
    containers.define("c")
    assert {name: claim.name for name, claim in containers.maps.overlaps().items()} == {"a": "b", "b": "a"}
    containers.start("a")
    assert containers.start("c").first == FIRST + 65536
    with pytest.raises(errors.InvalidDefinition, match="container a") as caught:
        containers.start("b")
    assert "container create" in str(caught.value.hint)
    containers.stop("a")
    containers.start("b")


@pytest.mark.skipif(os.geteuid() != 0, reason="root file systems of root's")
@on_loop
async def test_started_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch)
    names = ["web1", "web2", "web3", "web4"]
    try:
        async with site.world.daemon() as host:
            for name in names:
                root = f"{tmp_path}/{name}-root"
                os.mkdir(root)
                for entry in ("usr", "sbin"):
                    os.symlink(f"{site.root}/{entry}", f"{root}/{entry}")
                text = f'name = "{name}"\nrootfs = "{root}"\nterminal = false\ncommand = ["/init"]\n'
                with open(f"{root}/init", "w") as file:
                    file.write("")
                os.chmod(f"{root}/init", 0o755)
                await host.containers.define(text, "test", check=False, by=ROOT)
            await asyncio.gather(*(host.containers.start(name, by=ROOT) for name in names))
            found = [(await host.containers.info(name))["ids"] for name in names]
            assert disjoint([model.IdMap(*one) for one in found]), found
            # Twice the same by hand is refused, and changes nothing.
            text = f'name = "other"\nrootfs = "{tmp_path}/other"\n[idmap]\nfirst = {found[1][0] + 5}\n'
            with pytest.raises(errors.InvalidDefinition, match="container web"):
                await host.containers.define(text, "test", check=False, by=ROOT)
            for name in names:
                await host.containers.stop(name, by=ROOT)
    finally:
        site.world.close()
