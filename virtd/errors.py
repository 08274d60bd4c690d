# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every error that virtd reports to a person, in one tree.

    VirtdError
     ├── InvalidDefinition   a definition or configuration file is wrong: file, key, expected
     ├── NotFound            no object of that name
     ├── Exists              the name, uuid or file is taken
     ├── InvalidState        the operation makes no sense in the object's present state
     ├── Busy                somebody else holds the object, or a resource that it needs
     ├── AccessDenied        the caller may read, but not do this
     ├── BudgetExceeded      with one more slot the daemon could not be started again
     ├── StartFailed         the child did not come up; contains its own messages
     ├── TimedOut            a time limit passed; says for what
     ├── MonitorError        QEMU refused a command, or its monitor doesn't answer
     ├── HostError           systemd, the kernel or a file system refused something
     └── Disconnected        (clients) the daemon went away and didn't come back in time

An error crosses a front end as its class name plus `fields()`; `from_wire` recreates it on the other side. Any other
exception is a bug and may be loud: a Bug if the code itself detects it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself costs virtdctl 3 ms
    from typing import ClassVar

    from .hints import Hint


class Bug(Exception):
    """Something impossible unless virtd itself is wrong. It names the object; no front end translates it."""


class VirtdError(Exception):
    """The root of the tree.

    `message` is one sentence without the final stop; `hint` says what the reader can do about it and may be empty.
    """

    details: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str, *, hint: Hint = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def fields(self) -> dict[str, str]:
        """What goes over the wire: `message`, `hint` and the class's own `details`, all strings."""
        return {"message": self.message, "hint": str(self.hint)} | {
            key: str(getattr(self, key)) for key in self.details
        }


class InvalidDefinition(VirtdError):
    """A file has an invalid value: `file`, `key` (dotted, as in `disk[0].path`) and what was `expected`."""

    details = ("file", "key", "expected")

    def __init__(self, file: str, key: str, expected: str, *, hint: Hint = "") -> None:
        super().__init__(f"{file}: {key}: {expected}" if key else f"{file}: {expected}", hint=hint)
        self.file = file
        self.key = key
        self.expected = expected


class NotFound(VirtdError):
    """There is no such object."""


class Exists(VirtdError):
    """The name, the uuid or the file is taken."""


class InvalidState(VirtdError):
    """The operation makes no sense in the object's present state."""


class Busy(VirtdError):
    """Another operation, another client or another guest holds what is needed."""


class AccessDenied(VirtdError):
    """The caller isn't allowed to do this."""


class BudgetExceeded(VirtdError):
    """The FD store has no room for the slots that the object needs."""


class StartFailed(VirtdError):
    """The child didn't come up; the message carries the last lines that it wrote to stderr."""


class TimedOut(VirtdError):
    """A time limit passed before the expected event."""


class MonitorError(VirtdError):
    """QEMU refused a QMP command, or its monitor doesn't answer."""


class HostError(VirtdError):
    """systemd, the kernel or a file system refused something that virtd needs."""


class Disconnected(VirtdError):
    """The daemon can't be reached."""


KINDS: dict[str, type[VirtdError]] = {cls.__name__: cls for cls in VirtdError.__subclasses__()} | {
    "VirtdError": VirtdError
}


def from_wire(kind: str, fields: dict[str, str]) -> VirtdError:
    """The error that `kind` and `fields` describe; an unknown kind (a newer daemon) becomes a plain VirtdError."""
    cls = KINDS.get(kind, VirtdError)
    error = cls.__new__(cls)
    VirtdError.__init__(error, fields.get("message", kind), hint=fields.get("hint", ""))
    for key in cls.details:
        setattr(error, key, fields.get(key, ""))
    return error
