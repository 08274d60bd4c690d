# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtdctl toy."""

from __future__ import annotations

from functools import partial

from virtd.cli import console, domains, log, show

MODULE = "tests.toydriver.cli"
COMMANDS = {
    "list": (MODULE, "Toys", "", "List toys with their state", "list toys"),
    "info": (MODULE, "Toys", "NAME", "Show everything about one toy", "show {name}"),
    "start": (MODULE, "Toys", "NAME...", "Start toys", ""),
    "stop": (MODULE, "Toys", "NAME...", "End toys at once", ""),
    "console": (MODULE, "Toys", "NAME", "Connect to a toy's console", "open the console of {name}"),
    "log": (MODULE, "Toys", "NAME", "Show what a toy wrote", "show the log of {name}"),
    "define": (MODULE, "Toys", "FILE|-...", "Define toys", ""),
}
OPTIONS = {
    "list": show.list_options,
    "info": partial(show.named, noun="toy"),
    "start": domains.names,
    "stop": domains.names,
    "console": partial(console.options, noun="toy"),
    "log": partial(log.options, noun="toy", what="the toy itself"),
    "define": domains.define_options,
}
RUN = {
    "list": show.listing("Toy.List", "toy", "toy"),
    "info": show.informing("Toy.Info", lambda item: f"toy {item.get('uuid')}", lambda _item: [], "it"),
    "start": domains.plain("start", "Toy.Start"),
    "stop": domains.plain("stop", "Toy.Stop"),
    "console": console.attaching("toy", "Toy."),
    "log": log.logging("Toy.Follow"),
    "define": domains.defining("Toy.Define"),
}
