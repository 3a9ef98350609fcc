"""Everything that can go wrong between a notebook and a swarm, as one tree.

    SwarmError
    ├── AddressError          an address in the input is malformed
    ├── ConnectionFailed      no peer of the swarm answered
    │   └── ClocksDiffer      … or its clock is too far from ours
    ├── ModelNotFound         no config or weights under this name
    ├── ModelNotServed        the swarm is there, but nobody announces this model
    │   └── OtherCheckpoint   … or only with other weights than this notebook's
    ├── MissingBlocks         some blocks of the model have no server (any more)
    ├── InvitationError       an invitation that is cut, refused, or of no swarm that runs
    ├── BlocksOutOfRange      a span of blocks that the model does not have
    ├── ContextTooLong        more tokens than the model has positions
    ├── Busy                  something runs already that can run only once at a time
    ├── Unsupported           what a remote block cannot do, and what to use instead
    ├── PlanError             a plan for machines or bits that do not exist
    ├── DeviceMissing         a GPU that this machine does not have, or has no memory left on
    ├── ServerStartError      a local server process did not come up
    └── RemoteError           a server answered with an error
        ├── BadRequest        … it found the request invalid      (code ``bad_request``)
        ├── CacheFull         … its KV cache has no room          (code ``cache_full``)
        ├── ServerBusy        … too much is waiting there already (code ``busy``)
        ├── SessionLost       … it dropped this session's cache   (code ``session_lost``)
        ├── AdapterMissing    … it does not hold this adapter     (code ``adapter_missing``)
        ├── NotAMember        … the swarm is private, or wants us no more (code ``not_member``)
        ├── ShuttingDown      … it is leaving the swarm           (code ``shutting_down``)
        └── ServerFailed      … or hung, lied, failed inside      (code ``internal``)
            └── ServerGone    … or gave no sign of life any more

A message says what happened, at which block and peer, and what to do next. On the wire an error
is the text ``code: message`` (hivemind's ``RPCError.message``); `to_wire` and `from_wire` are the
two directions. Text from a peer is hostile: it is cut to a bounded length,
cleaned of what cannot be seen, and never evaluated.
"""

from __future__ import annotations

import re

from swarm_notebook.texts import clean

# A server's error, cut: the longest of ours has 600 characters.
MAX_WIRE_TEXT = 2000


def reference(kind: type[SwarmError]) -> str:
    """The heading in docs/troubleshooting.md about a kind of error: its name in kebab case."""
    return "SN" + re.sub(r"[A-Z]", lambda letter: f"-{letter[0].lower()}", kind.__name__)


class SwarmError(Exception):
    """Base of every error that swarm_notebook raises on purpose.

    Below its message a traceback shows `reference`, a heading of docs/troubleshooting.md.
    """

    def __init__(self, *args: object):
        super().__init__(*args)
        self.add_note(f"[{self.reference}]")

    @property
    def reference(self) -> str:
        """Where the documentation explains this kind: ``SN-missing-blocks`` for `MissingBlocks`."""
        return reference(type(self))


class AddressError(SwarmError, ValueError):
    """A multiaddr in the input cannot be parsed, or the file of an identity not be used."""


class ConnectionFailed(SwarmError, ConnectionError):
    """None of the given peers could be reached."""


class ClocksDiffer(ConnectionFailed):
    """This machine's clock and a peer's differ by more than records allow."""

    @classmethod
    def by(cls, ahead: float, of: str, most: float, why: str = "") -> ClocksDiffer:
        """What to say where this machine's clock is so many seconds ahead of somebody's."""
        return cls(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} "
            f"that of {of}, at most {most:.0f} s are allowed{why}; set the clock of whichever is "
            "wrong (with NTP, say) and connect again"
        )


class ModelNotFound(SwarmError, FileNotFoundError):
    """A model name leads to no config or no weights."""


class ModelNotServed(SwarmError, LookupError):
    """The swarm answers, but no server announces blocks of this model."""


class OtherCheckpoint(ModelNotServed):
    """The servers of a model have loaded other weights, or another config, than this notebook."""


class MissingBlocks(SwarmError):
    """Some blocks of the model have no server."""


class BlocksOutOfRange(SwarmError, ValueError):
    """A span of blocks lies outside of the model, or is empty."""


class InvitationError(SwarmError, ValueError):
    """An invitation is no whole one, or was refused; or keys of a private swarm are not there."""


class ContextTooLong(SwarmError, ValueError):
    """A sequence is longer than the model's context."""


class Unsupported(SwarmError, NotImplementedError):
    """Something a remote block cannot do; the message names what to use instead."""


class PlanError(SwarmError, ValueError):
    """A machine, a link or a number of bits that nothing can be planned with."""


class Busy(SwarmError, RuntimeError):
    """Something runs already that can run only once at a time."""


class DeviceMissing(SwarmError, ValueError):
    """A device that this machine does not have, or whose memory does not hold what is wanted."""


class ServerStartError(SwarmError, RuntimeError):
    """A local server process did not become ready; the message carries the end of its log."""


class RemoteError(SwarmError):
    """A server answered a request with an error."""

    code = "internal"


class BadRequest(RemoteError, ValueError):
    """The server found the request invalid; sending it elsewhere would not help."""

    code = "bad_request"


class CacheFull(RemoteError):
    """The server has no room for this session's keys and values."""

    code = "cache_full"


class ServerBusy(RemoteError):
    """The server has too many requests or sessions of this peer, or of all, to take another."""

    code = "busy"


class SessionLost(RemoteError):
    """The server dropped this session's cache; the client rebuilds it from its history."""

    code = "session_lost"


class AdapterMissing(RemoteError):
    """The server does not hold this version of an adapter; the client uploads it and repeats."""

    code = "adapter_missing"


class NotAMember(RemoteError):
    """A private swarm does not let a peer in: it has shown no certificate that holds."""

    code = "not_member"


class ShuttingDown(RemoteError):
    """The server is leaving the swarm and takes no more requests."""

    code = "shutting_down"


class ServerFailed(RemoteError):
    """The server hung, broke the protocol or failed inside."""

    code = "internal"


class ServerGone(ServerFailed):
    """The server gives no sign of life: it has died, or cannot be reached."""


# Not those below them, such as `ServerGone`: nobody says so of itself.
_BY_CODE = {kind.code: kind for kind in RemoteError.__subclasses__()}

# How Petals' servers begin to say that a session has no room: more than it reserved, more than a
# session may have, more than is free.
_PETALS_NO_ROOM = (
    "Maximum length exceeded",
    "Cannot allocate KV cache",
    "Could not allocate",
    "Server's attention cache is full",
)


def to_wire(error: BaseException) -> str:
    """The text that travels for `error`; anything but a `RemoteError` becomes ``internal``."""
    if isinstance(error, RemoteError):
        return f"{error.code}: {error}"[:MAX_WIRE_TEXT]
    return f"{ServerFailed.code}: {type(error).__name__}: {error}"[:MAX_WIRE_TEXT]


def from_wire(text: str, peer: str) -> RemoteError:
    """The error that a peer sent as `text`.

    Of Petals' texts those about room in the cache are known; all other text is `ServerFailed`.
    """
    text = clean(text[:MAX_WIRE_TEXT])
    code, separator, message = text.partition(": ")
    kind = _BY_CODE.get(code) if separator else None
    if kind is None:
        kind = CacheFull if text.startswith(_PETALS_NO_ROOM) else ServerFailed
        message = text
    return kind(f"server {peer}: {message}")
