# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.virtd1.Toy on D-Bus."""

from __future__ import annotations

from virtd.api.introspection import SUPERVISED, Args, Interface, Method
from virtd.api.kinds import Kind
from virtd.api.variants import supervised
from virtd.systemd.bus import Var

INTERFACE = Interface(
    methods={
        "Info": Method("org.virtd1.Toy.Info", Args(), Args("info=object:a{sv}")),
        "Start": Method("org.virtd1.Toy.Start", Args(), Args("changed:b")),
        "Stop": Method("org.virtd1.Toy.Stop", Args(), Args("changed:b")),
    },
    properties=SUPERVISED,
    signals={"Ended": Args("exit:a{sv}")},
)
KIND = Kind(
    segment="toy",
    interface="org.virtd1.Toy",
    driver="toy",
    listing=lambda host: host.supervised("toy").listing(),
    info=lambda host, name: host.supervised("toy").info(name),
    properties=supervised,
    late={"Exit": Var("a{sv}", {})},
    ended=True,
)
