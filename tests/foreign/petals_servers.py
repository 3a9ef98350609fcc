"""Servers of a real Petals (its last release): processes of the environment that ``PETALS`` names.

`make foreign` installs it (`install-petals`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.patience import wait_until

PYTHON = Path(os.environ["PETALS"]) / "bin" / "python"
ADDRESS = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")


def environment() -> dict[str, str]:
    """That of Petals' processes: nothing of ours is imported there, and no card is used."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**kept, **offline, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class PetalsServer:
    """A process of ``petals.cli.run_server``."""

    def __init__(self, folder: Path, start: int, end: int, log: Path, *swarm: str):
        command = [PYTHON, "-W", "ignore", "-m", "petals.cli.run_server", folder]
        options = f"--dht_prefix {folder.name} --block_indices {start}:{end} --device cpu"
        options += " --torch_dtype float32 --throughput 10 --no_auto_relay --num_handlers 1"
        options += " --skip_reachability_check --attn_cache_tokens 65536"
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *options.split(), *swarm],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )

    @property
    def started(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return "[INFO] Started" in self.log.read_text()

    @property
    def address(self) -> str:
        found = ADDRESS.search(self.log.read_text())
        assert found is not None
        return found[0]

    def kill(self) -> None:
        """It, and the processes that it has forked."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.wait()


@contextmanager
def petals(folder: Path, logs: Path, *spans: tuple[int, int]) -> Iterator[list[PetalsServer]]:
    servers: list[PetalsServer] = []
    try:
        for start, end in spans:
            swarm = ["--initial_peers", servers[0].address] if servers else ["--new_swarm"]
            log = logs / f"petals-{len(servers)}.log"
            servers.append(PetalsServer(folder, start, end, log, *swarm))
            wait_until(lambda: servers[-1].started, "a Petals server")
        yield servers
    finally:
        for server in servers:
            server.kill()
