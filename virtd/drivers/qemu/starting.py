# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting a guest: what QEMU needs besides what every start does."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import msgspec

from ... import errors, files, layout
from ...children.programs import ENVIRONMENT
from ...guests import start as starting
from ...guests.start import Start
from ...hints import do
from ...model import domain as model
from ...systemd.names import mount_units
from ...systemd.state import EXIT_GROUP, EXIT_USER, StartFailed
from ...systemd.transient import UnitSpec
from . import (
    access,
    command,
    directory,
    ends,
    hardware,
    images,
    media,
    nics,
    opened,
    ownership,
    prerequisites,
    sandbox,
    userdb,
)
from .devices import assembly, placing
from .devices.flash import Flash
from .guest import DRIVER, QemuGuest
from .users import Living

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...children.pipes import Ends
    from ...objects.conflicts import Holding
    from .users import Users


async def start(machine: QemuGuest, others: list[QemuGuest], users: Users, by: str) -> bool:
    """See guests/start.py. `others`: the driver's other domains; `users`: the table of their users."""

    async def ready(domain: model.Domain) -> _Start:
        disks = await images.resolve(domain, machine.source, machine.peers, by)
        account = await users.account(machine.name, machine.uuid, [_living(one) for one in (machine, *others)])
        try:
            before = machine.hardware.on_record()
        except errors.HostError as exc:
            raise hardware.damaged(exc, machine.name) from exc
        return _Start(machine, domain, disks, before, others, users, account, by)

    return await starting.start(machine, ready)


def _toplevel() -> list[str]:
    """The directories in the host's root."""
    return sorted(entry.name for entry in os.scandir("/") if entry.is_dir(follow_symlinks=False))


def _living(machine: QemuGuest) -> Living:
    return Living(machine.uuid, machine.user.uid if machine.user is not None else None)


class _Start(Start[QemuGuest, model.Domain]):
    def __init__(
        self,
        machine: QemuGuest,
        domain: model.Domain,
        disks: list[images.Image],
        before: hardware.Hardware | None,
        others: list[QemuGuest],
        users: Users,
        account: prerequisites.Account,
        by: str,
    ) -> None:
        super().__init__(machine, domain, machine.peers, by)
        self.disks = disks
        self.others = others
        self.settings = machine.settings
        self.users = users
        self.account = account
        self.user = userdb.Named(account.user, account.uid) if account.own else None
        self.systemd = 0
        kvm = machine.shared.services.facts.has_kvm()
        self.hardware = hardware.assign(before, domain, machine.uuid, kvm=kvm)
        flash = self._flash()
        self.swtpm = self._swtpm()
        placed = self.hardware.devices
        self.nics = nics.plan(domain, machine.uuid, placed)
        self.vhost = bool(self.nics) and prerequisites.has_vhost(self.account)
        host = self.host = command.HostFacts(
            prerequisites.binary(self.settings),
            kvm,
            machine.runtime,
            {nic.index: nic.interface for nic in self.nics},
            self.vhost,
            flash,
        )
        self.absent = media.missing(domain)
        self.present = media.without(domain, self.absent) if self.absent else domain
        self.devices = assembly.assemble(self.present, machine.uuid, host, disks, placed)
        self.shared = [disk.path for disk in disks if disk.shared]
        self.given: list[ownership.Given] = []
        self.shown: list[str] = []
        self.provided: dict[str, bytes] = {}

    def _flash(self) -> Flash | None:
        """Its UEFI, whose build becomes part of its hardware. Raises InvalidDefinition."""
        if self.definition.boot.firmware is not model.Firmware.UEFI:
            return None
        from . import firmware  # most guests have none

        secure = self.definition.boot.secure_boot
        store = self.services.paths.nvram(self.machine.name, self.machine.uuid, secure=secure)
        build = firmware.choose(self.hardware, self.definition, self.machine.source, store)
        self.hardware = msgspec.structs.replace(self.hardware, firmware=build)
        return Flash(build=build, store=store)

    def _swtpm(self) -> str:
        """The program that emulates its TPM; "" if it has none. Raises InvalidDefinition."""
        if self.definition.tpm is None:
            return ""
        from . import swtpm  # most guests have none

        return swtpm.program(self.machine.source)

    def check(self) -> None:
        hardware.require_places(self.hardware, self.definition, self.machine.source)
        prerequisites.check_files(self.present, self.machine.source, self.account)
        access.require_devices(self.account, kvm=self.host.kvm, tap=bool(self.nics))
        hidden = sandbox.hidden(_toplevel())
        self.shown = access.shown(self.host.binary, hidden, self.account)
        access.require_passable(self._files(), hidden, self.account)
        nics.check(self.definition, self.machine.source, self.machine.peers)
        if not self.definition.guest.is_empty:
            from . import provisioning  # most guests are set up by hand

            self.provided = provisioning.contents(self.definition, self.machine.uuid, self.machine.source)

    def holdings(self) -> Iterator[Holding]:
        from ...objects import conflicts
        from . import holdings  # no start of the daemon needs it

        yield from holdings.of_images(opened.identified(self.devices), self.shared)
        yield from holdings.of_cards(self.nics, conflicts.bridges(self.peers))

    def data(self) -> dict[str, Any]:
        images.require_free(self.disks, self.machine.peers)
        files = [
            *(file for device in self.devices for file in device.files()),
            *((path, False) for path in self.definition.boot.files),
        ]
        running = {other.user.uid for other in self.others if other.user is not None}
        self.given = ownership.needed(files, self.account, self.users.leftovers(running), self.shared)
        assert self.child.stderr is not None
        images_open = opened.identified(self.devices)
        return {
            # Where the output of this run begins, which shows what ends it.
            "words_from": {"file": self.child.stderr.file, "offset": self.words_from},
            "disks": [disk.path for disk in self.disks],
            "numbers": [disk.number for disk in placing.of_kind(self.hardware.devices, placing.DISK)],
            "images": opened.recorded(images_open),
            "sizes": opened.sizes(images_open),
            "hardware": msgspec.to_builtins(self.hardware),
            "given": ownership.to_record(self.given),
            "nics": [msgspec.to_builtins(nic) for nic in self.nics],
            **({"shared": self.shared} if self.shared else {}),
            **({media.MEDIA: self.absent} if self.absent else {}),
            **({"account": self.user._asdict()} if self.user is not None else {}),
            **({"tpm": msgspec.to_builtins(self.machine.tpm.promised())} if self.swtpm else {}),
        }

    async def reach(self) -> None:
        self.systemd = await (await self.services.units()).version()
        if self.host.flash is not None:
            from . import firmware

            # Templates for aarch64 have 64 MiB.
            await asyncio.to_thread(firmware.prepare, self.host.flash)
        if self.swtpm:
            await self.machine.tpm.require_free()

    def prepare(self, _ends: Ends) -> None:
        if self.hardware.known:  # otherwise QEMU is asked first, see Kept.learn
            self.machine.hardware.keep(self.hardware)
        if self.user is not None:
            userdb.add(self.services.paths.userdb, self.user, self.machine.name)
        ownership.hand_over(self.given, self.account)
        self._runtime()

    async def connect(self) -> None:
        await nics.connect(self.machine.name, self.nics, self.account.uid, self.machine.peers)
        if self.swtpm:
            path = directory.tpm_socket(self.machine.runtime)
            await self.machine.tpm.start(self.swtpm, self.account, path, _toplevel())

    def _runtime(self) -> None:
        """The guest's own directory, for its sockets and what its system is given; see directory.py."""
        runtime = self.machine.runtime
        try:
            layout.ensure(self.services.paths)
            files.remove_tree(runtime)
            os.mkdir(runtime, mode=0o700)
            if self.provided:
                from . import provisioning

                provisioning.write(runtime, self.provided, self.account.gid)
            os.chown(runtime, self.account.uid, self.account.gid)
        except OSError as exc:
            raise errors.HostError(f"Cannot make {runtime}: {exc.strerror}") from exc

    def spec(self) -> UnitSpec:
        machine = self.machine
        user, group = self.account.in_unit
        return UnitSpec(
            name=machine.unit,
            description=f"Domain {machine.name}",
            slice=f"virtd-{DRIVER}.slice",
            once=True,
            argv=tuple(self._argv()),
            environment=ENVIRONMENT,
            user=user,
            group=group,
            supplementary_groups=self.account.groups if self.host.kvm or self.nics else (),
            properties=tuple(
                sandbox.properties(
                    self.definition,
                    machine.runtime,
                    toplevel=_toplevel(),
                    program=self.shown,
                    devices=prerequisites.devices(kvm=self.host.kvm, tap=bool(self.nics), vhost=self.vhost),
                    stop_after=self.definition.host_shutdown_timeout or self.settings.host_shutdown_timeout,
                    has=self.devices,
                    own_user=self.account.own,
                    systemd=self.systemd,
                    kvm=self.host.kvm,
                    memory_overhead=self.settings.overhead_bytes,
                    tasks_overhead=self.settings.tasks_overhead,
                )
            ),
            # When the host goes down, these stay until QEMU has ended.
            after=tuple(
                sorted({unit for path in self._files() for unit in mount_units(path)})
                + ([self.machine.tpm.unit] if self.swtpm else [])
            ),
        )

    def _argv(self) -> list[str]:
        kind, model = self.hardware.type, self.hardware.model
        return command.argv(self.definition, self.machine.uuid, self.host, self.devices, machine=kind, cpu=model)

    def _files(self) -> set[str]:
        """Every file that the guest is shown, including those of its volumes."""
        files = (file.path for device in self.devices for file in device.files())
        return {*self.definition.boot.files, *files}

    async def come_up(self) -> None:
        """Wait until QEMU answers its monitor, or ends."""
        machine = self.machine
        attaching = asyncio.ensure_future(machine.attach(self.settings.start_timeout))
        ended = asyncio.ensure_future(self.child.ended())
        try:
            await asyncio.wait((attaching, ended), return_when=asyncio.FIRST_COMPLETED)
            # When QEMU ends, its monitor can break a moment before the end is noticed.
            if ended.done() or not self.child.alive():
                units = await self.services.units()
                how = ends.how(await units.ended(machine.unit))
                raise errors.StartFailed(f"Cannot start {machine.name}: {self.host.binary} {how}")
            if (problem := machine.problems.pop("monitor", None)) is not None:
                raise errors.StartFailed(problem.text)
            ownership.check_shown(self.child.pid, opened.taken(machine.data, None))
            machine.watch_tpm()
            media.report(machine)
        finally:
            for task in (attaching, ended):
                task.cancel()
            await asyncio.gather(attaching, ended, return_exceptions=True)

    def explained(self, exc: errors.VirtdError) -> errors.VirtdError:
        status = exc.state.exec_status if isinstance(exc, StartFailed) and exc.state is not None else 0
        if self.user is not None and status in (EXIT_GROUP, EXIT_USER):
            return errors.StartFailed(
                f"Cannot start {self.machine.name}: the host doesn't know its user {self.user.name}, "
                f"whose name is in {self.services.paths.userdb}",
                hint=(
                    "nss-systemd(8) makes it known: install it (Debian: libnss-systemd), and have systemd in the "
                    "lines passwd and group of /etc/nsswitch.conf. Or set qemu.user in virtd.toml, so that all "
                    "guests run as one user, which is less secure."
                ),
            )
        explained = super().explained(exc)
        if self.swtpm and "tpm-emulator" in explained.message:
            return errors.StartFailed(explained.message, hint=f"See: journalctl -u {self.machine.tpm.unit}")
        if (kind := self.hardware.type) and f'"{kind}"' in explained.message:
            hint = do("upgrade-machine", "domain", self.machine.name) + " takes what this QEMU has instead."
            return errors.StartFailed(f"{explained.message}: the machine that it has had so far", hint=hint)
        return explained

    def own_words(self, words: str) -> str:
        """QEMU's last lines, without the program's name at the beginning of each."""
        lines = [
            line.partition(": ")[2] if line.split(":")[0].rpartition("/")[2].startswith("qemu") else line
            for line in words.splitlines()
            if not ends.is_aside(line)
        ]
        return "; ".join(line for line in lines[-3:] if line)
