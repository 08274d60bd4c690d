# SPDX-License-Identifier: LGPL-2.1-or-later
"""The MESSAGE_ID of every journal entry that has an explanation in units/virtd.catalog (`journalctl -x` shows it).

An id never changes: people's scripts and alerts filter on it. The text around it may change.
"""

from __future__ import annotations

from enum import StrEnum


class Message(StrEnum):
    """128-bit identifiers in hex, as journal.send() wants them."""

    RECOVERED = "b6bd249aeeea43708dafa5234ca8616b"
    ADOPTED = "22546dadd9e84399a723b95b27b41cbf"
    ROLLED_BACK = "adc4e92a0c51458a84f6e7bf6cef2d0a"
    STARTED = "807893ca7985403796ccddb11d8ac35d"
    ENDED = "6115ded11c3f465fb89eb3933d48bda9"
    BUDGET_REFUSED = "c7c45227bb224aa4a5d58467d9b4cd31"
    STORE_AT_RISK = "6f4eb7b9b9ad490fb97096ff712a0f76"
    DISK_LOST = "3f871d768f7144c2bbe9dc21a6db38d7"
    SLOT_LOST = "434df9878eb44e91ab45cac302399b1b"
    DEFINITION_PROBLEM = "50cf1f321eca47cdba17dd6a9dac91b5"
    RECORD_QUARANTINED = "3142af82e88f47c38822db8f3387b37d"
    NETWORK_RULES_RESTORED = "21e43107966e47b2ab867a8dae253086"
    NETWORK_PUT_BACK = "efb95653ab804ad28a8992db175e81fb"
    NETWORK_SERVER_ENDED = "7febd2561fc74f0b998ec8560d23bede"
    NETWORK_BRIDGE_LOST = "b9bed95a412548f2aaa2334497fd6736"
    NETWORK_PENDING = "7b5c4ffc02354c00b1d3d83cdbbca447"
    NETWORK_PORT_REFUSED = "b2f00936ae424d419aebee6e356b50c6"
    NETWORK_OBSTRUCTED = "6e38494eb6c0498ab470a09b0c10fafd"
    NETWORK_PORT_SERVED = "70d09f9055f945d5a16a5bdebdad281d"
    EVENTS_HELD_BACK = "837222fc21dd42f19e55617a82543d49"
    GUEST_STOOD_STILL = "782c88cc5cb7448e8624c08fd973bdf0"
    DISK_FAILED = "d290199c2a3d45f88011a2a018a6c848"
    TPM_ENDED = "06ae3ff1289ae0cf06470751b3635e9d"
    MEDIUM_MISSING = "50914dba33224d24ae328c0c86b79428"
    AUTOSTARTED_LATE = "eee5b42f3994464a80d71623ab0482ae"


OBJECT = ("VIRTD_DRIVER", "VIRTD_NAME", "VIRTD_UUID")

# The fields that go with each entry. The catalogue's text may refer to these and to no others.
FIELDS: dict[Message, tuple[str, ...]] = {
    Message.RECOVERED: ("VIRTD_OBJECTS", "VIRTD_MS"),
    Message.ADOPTED: (*OBJECT, "VIRTD_UNIT", "VIRTD_PID"),
    Message.ROLLED_BACK: (*OBJECT, "VIRTD_UNIT"),
    Message.STARTED: (*OBJECT, "VIRTD_UNIT", "VIRTD_PID"),
    Message.ENDED: (*OBJECT, "VIRTD_UNIT", "VIRTD_CAUSE"),
    Message.BUDGET_REFUSED: (*OBJECT, "VIRTD_USED", "VIRTD_MAX"),
    Message.STORE_AT_RISK: (),
    Message.DISK_LOST: (*OBJECT, "VIRTD_UNIT"),
    Message.SLOT_LOST: (*OBJECT, "VIRTD_SLOT"),
    Message.DEFINITION_PROBLEM: ("VIRTD_FILE",),
    Message.RECORD_QUARANTINED: ("VIRTD_DRIVER", "VIRTD_NAME", "VIRTD_FILE"),
    Message.NETWORK_RULES_RESTORED: ("VIRTD_DRIVER", "VIRTD_NAME"),
    Message.NETWORK_PUT_BACK: ("VIRTD_DRIVER", "VIRTD_NAME"),
    Message.NETWORK_SERVER_ENDED: (*OBJECT, "VIRTD_UNIT"),
    Message.NETWORK_BRIDGE_LOST: (*OBJECT, "VIRTD_UNIT"),
    Message.NETWORK_PENDING: (*OBJECT, "VIRTD_UNIT"),
    Message.NETWORK_PORT_REFUSED: (*OBJECT, "VIRTD_UNIT", "VIRTD_USER"),
    Message.NETWORK_OBSTRUCTED: (*OBJECT, "VIRTD_UNIT"),
    Message.NETWORK_PORT_SERVED: (*OBJECT, "VIRTD_UNIT"),
    Message.EVENTS_HELD_BACK: (*OBJECT, "VIRTD_UNIT"),
    Message.GUEST_STOOD_STILL: (*OBJECT, "VIRTD_UNIT"),
    Message.DISK_FAILED: (*OBJECT, "VIRTD_UNIT"),
    Message.TPM_ENDED: (*OBJECT, "VIRTD_UNIT"),
    Message.MEDIUM_MISSING: (*OBJECT, "VIRTD_UNIT"),
    Message.AUTOSTARTED_LATE: OBJECT,
}
