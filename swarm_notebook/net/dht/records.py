"""What servers say of themselves in the DHT, and what a reader makes of it.

Petals' records: under the key of every block it hosts, a server stores (subkey: its peer id) the
tuple ``(state, throughput, extra)``. Anybody can write any subkey, so a reader checks each field; a
record that does not hold water hides its peer, never more. Unknown keys are ignored: ours
(``swarm_notebook``, ``cache_tokens_total``, ``model`` and more) travel among Petals'.

Records of ours are signed by the peer that they speak of (`signed_record`, `is_signed`). The
signature does not depend on the block under which a record stands, as the record says itself which
blocks of which model it is about: one signature serves all, and whoever holds a record, a keeper in
the DHT too, can check it. An unsigned record never counts against a signed one.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from hivemind.utils import MSGPackSerializer, ValueWithExpiration, get_dht_time
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from swarm_notebook.net.identity import MAX_KEY_BYTES, Identity, is_peer_id, is_signature
from swarm_notebook.net.membership.certificate import SHOWN_BYTES, Membership, Role
from swarm_notebook.texts import clean

MODEL_INDEX_KEY = "_petals.models"  # Petals' own
# Block indices of records: five hundred times the deepest model's, and no loop over them is long.
MAX_BLOCK = 1 << 16
# How far from now a record may expire, in seconds: ours do after two minutes, Petals' after five.
# The rest is for clocks that differ. Nobody's false record outlives it.
MAX_SECONDS = 600.0
# Records under one key that are read, and the bytes of one. A large swarm has some hundred servers;
# a record takes some hundred bytes, with pings of others a few thousand.
MAX_SUBKEYS, MAX_RECORD_BYTES = 1024, 8 << 10
# From which version of our protocol on servers take 8-bit values (`protocol.PROTOCOL_VERSION`).
BYTES_VERSION = 2
# From which version on they compute a pass in the dtype that is asked for.
DTYPE_VERSION = 3
# From which version on they answer with the last positions only, if no others are wanted.
LAST_POSITIONS_VERSION = 4
# From which version on a session may begin with a copy of another one's cache.
COPY_VERSION = 6
# From which version on they push to each other, sign that and say what was pushed to them
# (`net.wire.prints`, `net.wire.hand_overs`).
PUSH_VERSION = 7

# The record stands under every block, so what we announce is to stay small. Petals' servers ping
# five neighbours per announcement and announce all that they pinged within five minutes.
MAX_PINGS, MAX_PINGS_READ = 16, 256

# Seconds; Petals announces infinity for a peer that does not answer.
Ping = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Of what tells packed weights from others (`checkpoint.packed`): four for each of 512 blocks.
MAX_PACKING_BYTES = 2048
# Letters of what servers say of themselves in words.
MAX_WORDS = 200

Name = Annotated[str, Field(max_length=MAX_WORDS), AfterValidator(clean)]
Block = Annotated[int, Field(ge=0, le=MAX_BLOCK)]

# What precedes all that is signed: nothing else that this key ever signs begins so.
_PURPOSE = "swarm_notebook record"
# Signatures that were checked, by hash: each is read again every ten seconds, under every block.
_CHECKED_MOST = 16384
_checked: OrderedDict[bytes, bool] = OrderedDict()


# Bits per weight of Petals' quantisations, scales included, and of dtypes.
PETALS_BITS = {"nf4": 4.25, "int8": 8.0}
DTYPE_BITS = {"float32": 32.0, "float64": 64.0}


class ServerState(enum.IntEnum):
    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


def to_petals_tokens(tokens: int, blocks: int) -> int:
    """Room for so many tokens in all of a server's blocks, in Petals' unit.

    Petals' ``cache_tokens_left`` (in a record) and ``cache_tokens_available`` (in an answer to
    rpc_info) count the keys and the values of each block by themselves.
    """
    return tokens * blocks * 2


class ServerInfo(BaseModel):
    """One server's record. Rates are tokens per second through one block (Petals' definition).

    Attributes:
        cache_tokens_left: in Petals' unit, see `to_petals_tokens`.
        cache_tokens_total: tokens in all blocks of the server.
        weight_bits: per weight of the blocks' matrices, if they were packed.
        weight_error: what that does to the blocks' output: mean square of the difference by mean
            square of the output.
        weight_perplexity: the whole model's perplexity at these bits, by that of its whole weights.
        packing: what tells the values of packed weights from others (`checkpoint.packed`), of each
            block `PACKING_BYTES`; zeros for those of the checkpoint.
        part_tokens: from how many tokens on a pass takes as long as its tokens need.
        engine: how steps run, for people: "compiled", "graph" or "plain", mostly with the reason.
        reproducible: what a session gets does not depend on who else is served, to the bit.
        moves: how the server goes to other blocks, see `server.presence.flow.Moves`.
        next_pings: round trips in seconds to servers of neighbouring blocks, by peer (base58 id).
        model: the prefix of the model that the record is about.
        digest: of the checkpoint that is served, see `checkpoint.files.digest`.
        member: what the server shows as a member of a private swarm.
        public_key: of the server, where its peer id does not hold it.
        signature: by the server, of all else in the record.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, extra="ignore")

    state: Annotated[ServerState, Field(strict=False)]
    throughput: Rate
    start_block: Block | None = None
    end_block: Block | None = None
    public_name: Name | None = None
    version: Name | None = None
    network_rps: Rate | None = None
    forward_rps: Rate | None = None
    inference_rps: Rate | None = None
    part_tokens: Annotated[int, Field(gt=0)] | None = None
    engine: Name | None = None
    reproducible: bool | None = None
    moves: int | None = None
    adapters: tuple[Name, ...] | list[Name] = ()
    torch_dtype: Name | None = None
    quant_type: Name | None = None
    using_relay: bool | None = None
    cache_tokens_left: Annotated[int, Field(ge=0)] | None = None
    next_pings: Annotated[dict[Name, Ping], Field(max_length=MAX_PINGS_READ)] | None = None
    swarm_notebook: int | None = None
    cache_tokens_total: Annotated[int, Field(ge=0)] | None = None
    weight_bits: Annotated[float, Field(gt=0, le=64)] | None = None
    weight_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    weight_perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    packing: Annotated[bytes, Field(max_length=MAX_PACKING_BYTES)] | None = None
    model: Name | None = None
    digest: Name | None = None
    member: Annotated[bytes, Field(max_length=SHOWN_BYTES)] | None = None
    public_key: Annotated[bytes, Field(max_length=MAX_KEY_BYTES)] | None = None
    signature: Annotated[bytes, Field(max_length=MAX_KEY_BYTES)] | None = None

    def to_record(self) -> tuple[int, float, dict[str, Any]]:
        """The tuple that is stored; keys without a value are left out."""
        extra = self.model_dump(exclude={"state", "throughput"}, exclude_none=True)
        extra["adapters"] = tuple(extra["adapters"])
        return int(self.state), float(self.throughput), extra


def parse_record(value: object) -> ServerInfo | None:
    """The record in a DHT value, or None when it is not one that we believe."""
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        return None
    extra = value[2] if len(value) == 3 else {}
    if not isinstance(extra, Mapping):
        return None
    try:
        return ServerInfo.model_validate(
            {**extra, "state": value[0], "throughput": value[1]}, strict=None
        )
    except (ValidationError, TypeError):
        return None


def is_member(membership: Membership | None, peer: str, info: ServerInfo) -> bool:
    """Whether a record is a server's of the private swarm; in a public one all are.

    What a member shows can be copied: the record itself must be signed by the peer as well, or
    have come from it.
    """
    return membership is None or membership.holds(peer, info.member, Role.SERVER)


def signed_record(
    info: ServerInfo, identity: Identity, expiration: float
) -> tuple[int, float, dict[str, Any]]:
    """The tuple that is stored, signed by the peer that it speaks of.

    Args:
        expiration: until when it is stored, in the DHT's time; the signature holds for no other.
    """
    stated = info.model_copy(update={"public_key": identity.stated_key or None})
    record = stated.to_record()
    signature = identity.sign(_signed_bytes(record, identity.peer_id.to_base58(), expiration))
    return *record[:2], {**record[2], "signature": signature}


def claims_signature(value: Any) -> bool:
    """Whether a record in the DHT, whatever it is, comes with a signature, be it right or wrong."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and isinstance(value[2], dict)
        and isinstance(value[2].get("signature"), bytes)
    )


def is_signed(peer: object, value: Any, expiration: float) -> bool:
    """Whether a peer has signed the record that stands under its id.

    Args:
        peer: the subkey, a base58 id if all is well.
        value: the record as it was read, whatever it is.
        expiration: until when it stands there.
    """
    if not isinstance(peer, str) or not claims_signature(value):
        return False
    extra = value[2]
    try:
        data = _signed_bytes(value, peer, expiration)
    except (TypeError, ValueError, OverflowError):
        return False
    known = hashlib.sha256(data + extra["signature"]).digest()
    right = _checked.get(known)
    if right is None:
        stated = extra.get("public_key", b"")
        right = isinstance(stated, bytes) and is_signature(peer, stated, data, extra["signature"])
        _checked[known] = right
        if len(_checked) > _CHECKED_MOST:
            _checked.popitem(last=False)
    return right


def is_signed_bytes(peer: object, value: bytes, expiration: float) -> bool:
    """`is_signed` of a record as it is kept in the DHT."""
    if b"signature" not in value:
        return False
    try:
        return is_signed(peer, MSGPackSerializer.loads(value), expiration)
    except Exception:  # hivemind's decoder raises a different type per malformation
        return False


def _signed_bytes(record: Sequence[Any], peer: str, expiration: float) -> bytes:
    """What a signature is over: msgpack with the fields in the order of their names."""
    extra = [[key, value] for key, value in sorted(record[2].items()) if key != "signature"]
    data: bytes = MSGPackSerializer.dumps(
        [_PURPOSE, peer, float(expiration), record[0], record[1], extra]
    )
    return data


@dataclass(frozen=True)
class Announcement:
    """A server's record as it was found in the DHT.

    Attributes:
        peer: under whose id (base58) it stands.
        expires: until when it holds, in the DHT's time.
        signed: by that peer. Anybody can have stored one that is not.
    """

    peer: str
    info: ServerInfo
    expires: float
    signed: bool


def announcements(
    found: ValueWithExpiration | None,
    prefix: str,
    membership: Membership | None,
    known: Collection[str] = (),
) -> Iterator[Announcement]:
    """The records under a block's key that may be believed; None, or rubbish, has none.

    That are those which the peer under whose id they stand has signed for this model, and those
    without any signature; in a private swarm, the signed ones of its servers alone. What is valid
    for longer than servers announce (`MAX_SECONDS`) is none of them.

    Args:
        prefix: of the model.
        known: peers whose records come first. Then come those with a signature, be it right or
            wrong, and no more than `MAX_SUBKEYS` are looked at.
    """
    entries = found.value if found is not None and isinstance(found.value, dict) else {}

    def later(item: tuple[Any, ValueWithExpiration]) -> tuple[bool, bool]:
        return item[0] not in known, not claims_signature(item[1].value)

    latest = get_dht_time() + MAX_SECONDS
    for peer, entry in itertools.islice(sorted(entries.items(), key=later), MAX_SUBKEYS):
        info = parse_record(entry.value)
        if info is None or not is_peer_id(peer) or entry.expiration_time > latest:
            continue
        signed = is_signed(peer, entry.value, entry.expiration_time)
        trusted = info.model == prefix if signed else membership is None and info.signature is None
        if trusted and is_member(membership, peer, info):
            yield Announcement(peer, info, entry.expiration_time, signed)


@dataclass(frozen=True)
class ServerSpan:
    """Blocks ``[start, end)`` that the server `peer` (base58 id) says it hosts."""

    peer: str
    start: int
    end: int
    info: ServerInfo

    @property
    def name(self) -> str:
        """What to call the server: its public name, or the end of its peer id."""
        return self.info.public_name or f"…{self.peer[-6:]}"

    @property
    def cache_left(self) -> int | None:
        """For how many tokens the server has room in its cache; None if it does not say."""
        left = self.info.cache_tokens_left
        hosted = to_petals_tokens(1, (self.info.end_block or 0) - (self.info.start_block or 0))
        # What a record says of its blocks may be nothing, or nonsense: then those seen here count.
        unit = hosted if hosted > 0 else to_petals_tokens(1, self.end - self.start)
        return None if left is None else left // unit

    @property
    def weight_bits(self) -> float:
        """Bits per weight that it computes with; Petals' names for quantised weights are known."""
        if self.info.weight_bits is not None:
            return self.info.weight_bits
        named = PETALS_BITS.get(self.info.quant_type or "")
        return named or DTYPE_BITS.get(self.info.torch_dtype or "", 16.0)

    @property
    def extended(self) -> bool:
        """Whether the server speaks our additions to Petals' protocol."""
        return (self.info.swarm_notebook or 0) >= 1

    @property
    def pushes(self) -> bool:
        """Whether it hands its output to the next server, signed, and says what it was handed."""
        return (self.info.swarm_notebook or 0) >= PUSH_VERSION

    @property
    def takes_bytes(self) -> bool:
        """Whether it takes 8-bit values."""
        return (self.info.swarm_notebook or 0) >= BYTES_VERSION

    @property
    def casts(self) -> bool:
        """Whether it computes a forward pass in whatever dtype it is asked for."""
        return (self.info.swarm_notebook or 0) >= DTYPE_VERSION

    @property
    def shortens(self) -> bool:
        """Whether it answers a step with the last positions only, if no others are wanted."""
        return (self.info.swarm_notebook or 0) >= LAST_POSITIONS_VERSION

    @property
    def copies(self) -> bool:
        """Whether a session on it may begin with a copy of another one's cache."""
        return (self.info.swarm_notebook or 0) >= COPY_VERSION


def spans_of(blocks: Mapping[int, Mapping[str, ServerInfo]]) -> list[ServerSpan]:
    """The spans of all servers, from the records found under each block.

    A server counts for exactly the blocks under which it stored a record: contiguous ones are one
    span. What a record claims about blocks where it does not stand is not believed.
    """
    spans: list[ServerSpan] = []
    open_spans: dict[str, ServerSpan] = {}
    for index in sorted(blocks):
        current: dict[str, ServerSpan] = {}
        for peer, info in blocks[index].items():
            before = open_spans.get(peer)
            if before is not None and before.end == index and before.info.state == info.state:
                current[peer] = ServerSpan(peer, before.start, index + 1, info)
            else:
                current[peer] = ServerSpan(peer, index, index + 1, info)
                if before is not None:
                    spans.append(before)
        spans.extend(span for peer, span in open_spans.items() if peer not in current)
        open_spans = current
    spans.extend(open_spans.values())
    return sorted(spans, key=lambda span: (span.start, span.end, span.peer))


class ModelRecord(BaseModel):
    """An entry of the model index: a served model's number of blocks and where it comes from."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, extra="ignore")

    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCK)]
    repository: Annotated[str, Field(max_length=500), AfterValidator(clean)] | None = None


def parse_model_record(value: object) -> ModelRecord | None:
    """The model record in a DHT value, or None when it is not one that we believe."""
    try:
        return ModelRecord.model_validate(value)
    except ValidationError:
        return None
