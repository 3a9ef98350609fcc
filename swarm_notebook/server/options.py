"""What a server is to serve, and with what of its machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.devices import device_named, dtype_on
from swarm_notebook.net.addresses import LOOPBACK
from swarm_notebook.server.adapters.store import AdapterLimits
from swarm_notebook.server.engine.passes.activation_store import BUDGET_BYTES

# Eight conversations of 2,048 positions.
CACHE_TOKENS = 16384
# Records are valid for two of them: a server that died is forgotten after two minutes at most.
UPDATE_PERIOD = 60.0


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and how; see ``swarm-notebook serve --help``.

    Attributes:
        model: a Hub id, a folder or a GGUF file; None is the demo model.
        blocks: the range ``[start, end)`` to host; None is all for who begins a swarm without a
            limit of ``memory``, else those that lift the swarm most.
        memory: bytes that the blocks may take. Where those that are wanted do not fit as they are,
            bits are chosen, too: as many blocks as fit at ``bits``, or at the fewest bits that are
            measured to be good enough, and then the most bits that hold these. None is a part of
            what is free, and ``bits`` are as given.
        identity: file of the private key behind the peer id; written if there is none.
        dtype: what to compute in; "auto" is the checkpoint's on a GPU, on a CPU float32, and
            bfloat16 if weights are packed to fit into the memory.
        device: a torch device; "auto" is a GPU where there is one.
        bits: per weight of the blocks' matrices, scales included; None leaves them as they are,
            those of a GGUF file packed where memory is short; 16 unpacks them in any case.
        dummy_weights: random ones of the model's shape, announced under another name.
        cache_tokens: budget of the key-value memory (rows x positions); None is `CACHE_TOKENS`.
        activation_bytes: budget for activations that are kept for a backward pass.
        adapter_bytes: the size of the adapters of one notebook.
        traffic_bytes: budget for what arrives and what waits to leave; None is what the largest
            requests of two peers take, and at least 512 MiB.
        threads: CPU threads of torch; None leaves it to torch.
        update_period: seconds between announcements.
        swarm: folder with the key of a private swarm (`net.membership.authority`), made if it is
            not there; None: the swarm is public, or there is an invitation among the peers.
        lan: be found on the local network, and join a swarm of the model that is (`net.lan`).
        reproducible: what a session gets does not depend on who else is served, to the bit.
        chosen: the server has chosen its blocks itself, and may choose others.
        exit_with_stdin: leave when standard input ends.
    """

    model: str | os.PathLike[str] | None
    blocks: tuple[int, int] | None = None
    initial_peers: Sequence[str] = ()
    host_maddrs: Sequence[str] = LOOPBACK
    identity: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    bits: float | None = None
    dummy_weights: bool = False
    cache_tokens: int | None = None
    activation_bytes: int = BUDGET_BYTES
    adapter_bytes: int = AdapterLimits.bytes
    traffic_bytes: int | None = None
    name: str | None = None
    threads: int | None = None
    update_period: float = UPDATE_PERIOD
    swarm: Path | None = None
    memory: int | None = None
    lan: bool = False
    reproducible: bool = False
    chosen: bool = False
    exit_with_stdin: bool = False

    def with_device(self) -> ServeOptions:
        """The options with a device of this machine, also in the place of "auto".

        Raises:
            DeviceMissing: it does not have the one that was named.
        """
        return replace(self, device=str(device_named(self.device)))

    def computes_in(self, source: ModelSource, *, packed: bool) -> str:
        """The dtype of a server with this device, if its weights have fewer bits or not."""
        if self.dtype != "auto":
            return self.dtype
        device = torch.device(self.device)
        return str(dtype_on(device, source.config().dtype, packed=packed)).removeprefix("torch.")
