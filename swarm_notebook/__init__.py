"""Attach a notebook to a swarm of machines and get an ordinary Hugging Face model.

    import swarm_notebook as sn
    swarm = sn.connect()                  # or sn.connect(["/ip4/…/p2p/Qm…"], model="org/name")
    swarm.model.generate(...)             # the model's own transformers class, blocks remote

Importing this package, or loading it as an IPython extension, imports nothing heavy: the public
names below are looked up on first use, because torch, transformers and hivemind together take
seconds to import (contract C8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarm_notebook.lazy import lazy_names

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from swarm_notebook.connecting import connect as connect
    from swarm_notebook.connecting import look as look
    from swarm_notebook.errors import SwarmError as SwarmError
    from swarm_notebook.local.lending import Lending as Lending
    from swarm_notebook.local.swarm import LocalServer as LocalServer
    from swarm_notebook.local.swarm import LocalSwarm as LocalSwarm
    from swarm_notebook.planning.plan import Plan as Plan
    from swarm_notebook.planning.plan import plan as plan
    from swarm_notebook.report.cost import Bill as Bill
    from swarm_notebook.report.cost import Preview as Preview
    from swarm_notebook.report.route import RouteTable as RouteTable
    from swarm_notebook.report.status import SwarmStatus as SwarmStatus
    from swarm_notebook.report.trace import Trace as Trace
    from swarm_notebook.swarm import Swarm as Swarm

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Bill": "report.cost",
        "Lending": "local.lending",
        "LocalServer": "local.process",
        "LocalSwarm": "local.swarm",
        "Plan": "planning.plan",
        "Preview": "report.cost",
        "RouteTable": "report.route",
        "Swarm": "swarm",
        "SwarmError": "errors",
        "SwarmStatus": "report.status",
        "Trace": "report.trace",
        "connect": "connecting",
        "errors": "errors",
        "look": "connecting",
        "plan": "planning.plan",
        "probing": "probing",
        "tuning": "tuning",
        "widgets": "widgets",
    },
)
__all__ = [
    "Bill",
    "Lending",
    "LocalServer",
    "LocalSwarm",
    "Plan",
    "Preview",
    "RouteTable",
    "Swarm",
    "SwarmError",
    "SwarmStatus",
    "Trace",
    "__version__",
    "connect",
    "errors",
    "look",
    "plan",
    "probing",
    "tuning",
    "widgets",
]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """What ``%load_ext swarm_notebook`` does: the magics, and imports warmed up meanwhile."""
    from swarm_notebook.notebook.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Undo exactly what loading did."""
    from swarm_notebook.notebook.magics import unload

    unload(shell)
