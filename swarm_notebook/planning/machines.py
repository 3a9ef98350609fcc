"""What machines can do: memory, bandwidth, arithmetic, and what a block costs beside them.

    machine("rtx3090")                  a card that is known here
    machine("m2-max:64GB")              the same with its own memory
    machine("laptop:16GB:60GB/s")       any other: its memory and its bandwidth
    machine("box:64GB:80GB/s:1.2TFLOPS")

Figures of known cards are what their makers publish; sizes are decimal. What is reached of them is
in the constants below, each with the measurement that it comes from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from swarm_notebook.errors import PlanError

# Of a card's published bandwidth and per block, compiled: the two numbers that explain 5.2 ms for
# 14.0 GB in 32 blocks and 17.1 ms for 65 GB in 38 blocks on an H200 (4.8 TB/s).
GPU_REACHED, GPU_BLOCK_SECONDS = 0.92, 0.00006
# Of a card's published arithmetic: 2,048 tokens through 14.0 GB of bfloat16 in 64 ms on an H200.
GPU_ARITHMETIC = 0.45
# Blocks with hardly any weights, in a server on a core of an AMD EPYC: 30 take 7.9 ms, 5 take 1.7.
CPU_BLOCK_SECONDS = 0.0003
# Operations per byte of bandwidth where nobody says more: two cores of an AMD EPYC do 110 GFLOPS
# in float32 and read 17 GB/s; an M2 does 3.6 TFLOPS and reads 100 GB/s.
CPU_OPERATIONS, MAC_OPERATIONS = 6.0, 36.0
# What a server takes beside its blocks: torch and its libraries, on a card also its context, the
# workspaces of cuBLAS and the graphs.
CPU_PROCESS_BYTES, GPU_PROCESS_BYTES = 700_000_000, 1_500_000_000
# Memory that is not a card's stays with the system in part; macOS keeps a quarter from its GPU.
SYSTEM_PART = 0.25


@dataclass(frozen=True)
class Machine:
    """One machine.

    Attributes:
        memory: bytes in all.
        bandwidth: bytes per second of its memory, as published or measured.
        operations: floating point operations per second of a long matrix product in the precision
            that it computes in.
        kind: ``gpu`` (a card with its own memory), ``mac``, or ``cpu``.
        source: where the figures come from.
        reached: the part of ``bandwidth`` that products with weights reach.
        block_seconds: what a block costs a step beside reading its weights.
    """

    name: str
    memory: int
    bandwidth: float
    operations: float
    kind: str
    source: str
    reached: float
    block_seconds: float

    @property
    def room(self) -> int:
        """Bytes for blocks, and for keys and values."""
        if self.kind == "gpu":
            return max(0, self.memory - GPU_PROCESS_BYTES)
        return max(0, int(self.memory * (1 - SYSTEM_PART)) - CPU_PROCESS_BYTES)

    @property
    def float_bits(self) -> int:
        """What a server computes and keeps its cache in if nobody says otherwise."""
        return 32 if self.kind == "cpu" else 16


def card(name: str, memory_gb: float, gb_per_s: float, tflops: float, source: str) -> Machine:
    """A card with memory of its own, by its published figures (dense, 16 bit)."""
    return Machine(
        name,
        int(memory_gb * 1e9),
        gb_per_s * 1e9,
        tflops * 1e12 * GPU_ARITHMETIC,
        "gpu",
        source,
        GPU_REACHED,
        GPU_BLOCK_SECONDS,
    )


def mac(name: str, memory_gb: float, gb_per_s: float) -> Machine:
    """A Mac in its common size, by the bandwidth that Apple publishes."""
    bandwidth = gb_per_s * 1e9
    return Machine(
        name,
        int(memory_gb * 1e9),
        bandwidth,
        bandwidth * MAC_OPERATIONS,
        "mac",
        "Apple, technical specifications",
        GPU_REACHED,
        GPU_BLOCK_SECONDS,
    )


def other(name: str, memory: int, bandwidth: float, operations: float | None = None) -> Machine:
    """A machine of which only these figures are known; it computes on its CPU."""
    return Machine(
        name,
        memory,
        bandwidth,
        operations or bandwidth * CPU_OPERATIONS,
        "cpu",
        "as given",
        1.0,
        CPU_BLOCK_SECONDS,
    )


_GA102 = "NVIDIA, Ampere GA102 whitepaper"
_AD102 = "NVIDIA, Ada GPU architecture whitepaper"
_TURING = "NVIDIA, Turing architecture whitepaper"
KNOWN = {
    machine.name: machine
    for machine in (
        card("rtx2080ti", 11, 616, 56.9, _TURING),
        card("rtx3060", 12, 360, 51.2, _GA102),
        card("rtx3080", 10, 760, 59.5, _GA102),
        card("rtx3090", 24, 936, 71, _GA102),
        card("rtx4060ti", 16, 288, 44, _AD102),
        card("rtx4070", 12, 504, 58.3, _AD102),
        card("rtx4080", 16, 717, 97.5, _AD102),
        card("rtx4090", 24, 1008, 165.2, _AD102),
        card("rtx5090", 32, 1792, 209.5, "NVIDIA, RTX Blackwell whitepaper"),
        card("a6000", 48, 768, 154.8, "NVIDIA, RTX A6000 datasheet"),
        card("rtx6000ada", 48, 960, 182.1, _AD102),
        card("t4", 16, 320, 65, "NVIDIA, T4 datasheet"),
        card("v100", 16, 900, 125, "NVIDIA, V100 datasheet"),
        card("a10", 24, 600, 125, "NVIDIA, A10 datasheet"),
        card("l4", 24, 300, 121, "NVIDIA, L4 datasheet"),
        card("l40s", 48, 864, 362, "NVIDIA, L40S datasheet"),
        card("a100", 80, 2039, 312, "NVIDIA, A100 datasheet (SXM)"),
        card("a100-40gb", 40, 1555, 312, "NVIDIA, A100 datasheet"),
        card("h100", 80, 3350, 989, "NVIDIA, H100 datasheet (SXM)"),
        card("h100-pcie", 80, 2000, 756, "NVIDIA, H100 datasheet"),
        card("h200", 141, 4800, 989, "NVIDIA, H200 datasheet"),
        card("b200", 180, 7700, 2250, "NVIDIA, DGX B200 datasheet"),
        card("mi300x", 192, 5300, 1307, "AMD, Instinct MI300X datasheet"),
        card("rx7900xtx", 24, 960, 122.8, "AMD, Radeon RX 7900 XTX specifications"),
        mac("m1", 8, 68.25),
        mac("m1-pro", 16, 200),
        mac("m1-max", 32, 400),
        mac("m1-ultra", 64, 800),
        mac("m2", 8, 100),
        mac("m2-pro", 16, 200),
        mac("m2-max", 32, 400),
        mac("m2-ultra", 64, 800),
        mac("m3", 8, 100),
        mac("m3-pro", 18, 150),
        mac("m3-max", 48, 400),
        mac("m3-ultra", 96, 819),
        mac("m4", 16, 120),
        mac("m4-pro", 24, 273),
        mac("m4-max", 48, 546),
    )
}

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = r"(\d+(?:\.\d+)?)\s*"


def machine(text: str | Machine) -> Machine:
    """A machine from ``NAME[:MEMORY[:BANDWIDTH[:ARITHMETIC]]]``.

    Raises:
        PlanError: it is not known and its figures are not given, or they cannot be read.
    """
    if isinstance(text, Machine):
        return text
    name, *figures = text.split(":")
    known = KNOWN.get(_key(name))
    if known is None and len(figures) < 2:
        raise PlanError(
            f"machine {text!r}: {name!r} is not known; give NAME:MEMORY:BANDWIDTH such as "
            f"laptop:16GB:60GB/s, or one of {', '.join(KNOWN)}"
        )
    if len(figures) > 3:
        raise PlanError(f"machine {text!r}: more than NAME:MEMORY:BANDWIDTH:TFLOPS")
    readers = (read_bytes, read_bandwidth, _read_operations)
    values = [read(figure) for read, figure in zip(readers, figures, strict=False)]
    if known is None:
        return other(name, int(values[0]), *values[1:])
    if not values:
        return known
    fields = dict(zip(("memory", "bandwidth", "operations"), values, strict=False))
    fields["memory"] = int(fields["memory"])
    return replace(known, name=name, source=f"{known.source}; as given", **fields)  # type: ignore[arg-type]


def _key(name: str) -> str:
    key = name.lower().replace(" ", "-").replace("_", "-")
    return key if key in KNOWN else key.replace("-", "")


def read_bytes(text: str) -> float:
    """``16GB``, ``512MiB`` or a plain number, in bytes."""
    found = re.fullmatch(_NUMBER + r"([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise PlanError(f"{text!r} is not a size, like 16GB")
    power = " KMGT".index(found[2].upper() or " ")
    return float(found[1]) * (1024.0**power if found[3] else 1000.0**power)


def read_bandwidth(text: str) -> float:
    """``60GB/s``, or ``100Mbit/s``, in bytes per second."""
    found = re.fullmatch(_NUMBER + r"([KMGT]?)(B|bit|b)/?p?s", text.strip())
    if not found or not float(found[1]):
        raise PlanError(f"{text!r} is not a bandwidth, like 60GB/s or 100Mbit/s")
    return float(found[1]) * _UNITS[found[2]] / (1 if found[3] == "B" else 8)


def _read_operations(text: str) -> float:
    found = re.fullmatch(_NUMBER + r"([GT])FLOPS", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise PlanError(f"{text!r} is not an arithmetic rate, like 1.5TFLOPS")
    return float(found[1]) * _UNITS[found[2].upper()]


@dataclass(frozen=True)
class Link:
    """The network between notebook and machines, and between machines.

    Attributes:
        round_trip: seconds.
        bandwidth: bytes per second.
    """

    round_trip: float
    bandwidth: float

    def one_way(self, count: float) -> float:
        """Seconds until so many bytes are there."""
        return self.round_trip / 2 + count / self.bandwidth


def read_link(text: str | Link) -> Link:
    """A link from ``ROUND_TRIP[:BANDWIDTH]``, such as ``50ms:100Mbit/s``; else 1 Gbit/s.

    Raises:
        PlanError: it cannot be read.
    """
    if isinstance(text, Link):
        return text
    trip, _, bandwidth = text.partition(":")
    found = re.fullmatch(_NUMBER + r"(us|ms|s)", trip.strip())
    if not found:
        raise PlanError(f"link {text!r}: {trip!r} is not a time, like 50ms")
    seconds = float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]
    return Link(seconds, read_bandwidth(bandwidth) if bandwidth else 125e6)
