# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Toy on D-Bus."""

from __future__ import annotations

from virtd.api.introspection import SUPERVISED, Args, Interface, methods
from virtd.api.kinds import Kind
from virtd.api.variants import supervised
from virtd.systemd.bus import Var

KIND = Kind(
    segment="toy",
    interface="org.virtd1.Toy",
    members=Interface(
        methods=methods(
            "org.virtd1.Toy",
            Info=("Info", "", "info=object:a{sv}"),
            Start=("Start", "", "changed:b"),
            Stop=("Stop", "", "changed:b"),
        ),
        properties=SUPERVISED,
        signals={"Ended": Args("exit:a{sv}")},
    ),
    driver="toy",
    listing=lambda host: host.supervised("toy").listing(),
    info=lambda host, name: host.supervised("toy").info(name),
    properties=supervised,
    late={"Exit": Var("a{sv}", {})},
    ended=True,
)
