"""Sessions without a notebook, and what the servers say of them: for benchmarks of servers."""

from __future__ import annotations

import time
from typing import Any

import psutil

PREFILL, STEPS = 32, 48
TOLERANCE = 1e-3


class BareSession:
    """A session without a notebook: random hidden states in, the last block's output out."""

    def __init__(self, connection: Any, hidden_size: int, seed: int):
        import torch

        noise = torch.Generator().manual_seed(seed)
        self._connection = connection
        self._session = connection.session()
        self._hidden = torch.randn(1, PREFILL + STEPS, hidden_size, generator=noise)
        self.outputs: list[Any] = []
        self.seconds: list[float] = []

    async def prefill(self) -> None:
        await self._pass(0, PREFILL)

    async def step(self) -> float:
        """One token; the seconds that it took."""
        position = PREFILL + len(self.seconds)
        began = time.perf_counter()
        self.outputs.append(await self._pass(position, 1))
        self.seconds.append(time.perf_counter() - began)
        return self.seconds[-1]

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await self.step()

    def close(self) -> None:
        self._session.close()

    async def _pass(self, position: int, length: int) -> Any:
        from swarm_notebook.client.session.history import Pass
        from swarm_notebook.client.session.session import Given

        hidden = self._hidden[:, position : position + length]
        self._session.begin(Pass(position, length, {0: hidden}), Given())
        last = self._connection.num_blocks
        return (await self._session.step(0, last)).states[last - 1]


def check(ours: list[BareSession], theirs: list[BareSession]) -> None:
    """Stop if what came out together is not what came out alone."""
    import torch

    for one, other in zip(ours, theirs, strict=True):
        for mine, alone in zip(one.outputs, other.outputs, strict=False):
            # Random inputs make large states: relative to their size.
            if (
                float((mine - alone).norm() / alone.norm()) > TOLERANCE
                or not torch.isfinite(mine).all()
            ):
                raise SystemExit("together and alone, outputs differ: a speed is meaningless")


def server_facts(swarm: Any) -> dict[str, Any]:
    """What the first server says of itself."""
    found: dict[str, Any] = swarm.info(swarm.route().hops[0].peer_id)
    return found


def cpu_seconds(servers: Any) -> float:
    """Processor time that the servers have used."""
    times = [psutil.Process(server.pid).cpu_times() for server in servers.servers]
    return sum(each.user + each.system for each in times)
