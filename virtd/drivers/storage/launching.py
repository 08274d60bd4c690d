# SPDX-License-Identifier: LGPL-2.1-or-later
"""The beginning of a job's program: see children/launch.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...children.child import Child
from ...children.launch import Launch
from ...children.programs import ENVIRONMENT
from ...objects.protocol import Problem
from ...systemd.transient import UnitSpec
from .task import DRIVER, State

if TYPE_CHECKING:
    from ...children.pipes import Ends
    from ...records import Process
    from .job import Job
    from .task import Program

SLICE = "virtd-storage.slice"


async def launch(job: Job, program: Program) -> None:
    """Start the program. A failure is undone, except for the volume that the job was to fill. Raises VirtdError."""
    launch = _Launch(job, program)
    await launch.launch()
    job.begun(launch.child)


class _Launch(Launch):
    def __init__(self, job: Job, program: Program) -> None:
        task = job.task
        super().__init__(
            Child(job.shared.services, DRIVER, job.name),
            f"Cannot {task.verb} {task.volume}",
            f"{job.name}, {task.verb} of {task.volume} in pool {task.pool},",
            {"VIRTD_DRIVER": DRIVER, "VIRTD_NAME": job.name, "VIRTD_UUID": ""},
        )
        self.job = job
        self.program = program
        self.waited = job.recorded  # for its client, and does so again when this fails

    def remember(self, promise: Process) -> None:
        self.job.save(State.RUNNING, **promise)

    def begin(self) -> None:
        self.job.child = self.child

    def prepare(self, ends: Ends) -> None:
        if self.program.source >= 0:
            ends.stdio = (self.program.source, *ends.stdio[1:])

    def spec(self) -> UnitSpec:
        task, program = self.job.task, self.program
        return UnitSpec(
            name=self.job.unit,
            description=f"{task.verb} {task.volume} in pool {task.pool}",
            slice=SLICE,
            argv=program.argv,
            environment=ENVIRONMENT,
            user=program.user,
            group=program.group,
            properties=program.properties,
        )

    def know(self, identity: Process) -> None:
        self.job.save(State.RUNNING, **identity)

    async def failed(self, _why: BaseException) -> None:
        job = self.job
        await job.put_away()
        if not self.waited:
            job.forget()
            job.over.set()
        elif job.state is not State.WAITING:
            job.save(State.WAITING)

    def trouble(self, text: str) -> None:
        self.job.problems["start"] = Problem(text)
