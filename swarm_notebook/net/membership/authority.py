"""Whoever began a private swarm: its key, and a book of invitations and members.

Both are files of a folder that its owner alone can read. The key never leaves it; every server on
this machine that is given the folder redeems invitations, and so the book is a database that
several processes may use at once (SQLite). A command that revokes somebody writes into the book,
and the servers see it within a second.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm_notebook.errors import InvitationError
from swarm_notebook.net.membership import INVITATION_SECONDS, RENEW_SECONDS
from swarm_notebook.net.membership.certificate import (
    MAX_REVOKED,
    Certificate,
    Credentials,
    Role,
    short,
    signed_revocations,
    when,
)
from swarm_notebook.net.membership.invitation import (
    ID_BYTES,
    MAX_ADDRESSES,
    MAX_NAME,
    SECRET_BYTES,
    Invitation,
    Redemption,
    Ruling,
    pack_answer,
)

# A year: who is no longer wanted is revoked, and who has forgotten the swarm is forgotten.
MEMBER_SECONDS = 365 * 86400
MAX_USES = 10_000
# A server that was not seen for so long does not run any more (it says so every ten seconds).
SERVER_SECONDS = 60.0
# SQLite's own lock: what is done under it takes milliseconds.
_LOCK_SECONDS = 10.0
_OWNER = b"swarm_notebook owner"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    id BLOB PRIMARY KEY, secret BLOB, role INT, expires INT, uses INT, used INT, revoked INT);
CREATE TABLE IF NOT EXISTS members (
    key BLOB PRIMARY KEY, invitation BLOB, role INT, joined INT, expires INT, revoked INT);
CREATE TABLE IF NOT EXISTS servers (peer TEXT PRIMARY KEY, addresses TEXT, model TEXT, seen INT);
"""


@dataclass(frozen=True)
class Member:
    """Somebody who has redeemed an invitation; times are in seconds of Unix time."""

    key: bytes
    invitation: bytes
    role: Role
    joined: int
    expires: int
    revoked: bool

    @property
    def name(self) -> str:
        """By which `Authority.revoke` knows the member."""
        return short(self.key)

    def __str__(self) -> str:
        state = "revoked" if self.revoked else f"until {when(self.expires)}"
        return (
            f"{self.name}  {self.role.label:8}  joined {when(self.joined)}  {state}  "
            f"by invitation {short(self.invitation)}"
        )


class Authority:
    """The private key of a swarm, and who was let in with it.

    Args:
        folder: where both are; made with a new key if it is not there.

    Attributes:
        swarm: the swarm's public key.

    Raises:
        InvitationError: the folder cannot be used.
    """

    swarm: bytes

    def __init__(self, folder: Path) -> None:
        self._folder, self._book = folder, folder / "members.sqlite"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._key = Ed25519PrivateKey.from_private_bytes(_secret_file(folder / "key"))
            os.close(os.open(self._book, os.O_RDWR | os.O_CREAT, 0o600))
            with self._open() as book:
                book.executescript(_SCHEMA)
        except (OSError, ValueError, sqlite3.Error) as error:
            raise InvitationError(
                f"the keys of the swarm in {folder} cannot be used: {error}"
            ) from None
        self.swarm = self._key.public_key().public_bytes_raw()

    @property
    def folder(self) -> Path:
        return self._folder

    def owner(self) -> Credentials:
        """Of whoever has the key: a member in the role of a server, who needs no invitation."""
        seed = hmac.digest(self._key.private_bytes_raw(), _OWNER, "sha256")
        member = Ed25519PrivateKey.from_private_bytes(seed)
        public = member.public_key().public_bytes_raw()
        expires = int(time.time()) + MEMBER_SECONDS
        certificate = Certificate(Role.SERVER, expires, public).signed(self._key)
        return Credentials(self.swarm, member, certificate)

    def invite(
        self, role: str = "notebook", *, expires: float = INVITATION_SECONDS, uses: int = 1
    ) -> Invitation:
        """A new invitation, by way of the servers of the swarm that run here now.

        Args:
            role: "notebook" or "server".
            expires: in how many seconds.
            uses: how many may redeem it.

        Raises:
            InvitationError: no server of the swarm runs here.
            ValueError: an argument is none.
        """
        wanted = Role.named(role)
        if not 1 <= uses <= MAX_USES:
            raise ValueError(f"uses: {uses}, expected 1 to {MAX_USES}")
        if not 0 < expires <= MEMBER_SECONDS:
            raise ValueError("expires: an invitation lasts for a year at most")
        until = int(time.time() + expires)
        made, secret = secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        with self._open() as book:
            found = book.execute(
                "SELECT addresses, model FROM servers WHERE seen > ? ORDER BY seen DESC",
                (time.time() - SERVER_SECONDS,),
            ).fetchall()
            if not found:
                raise InvitationError(
                    f"no server of the swarm {short(self.swarm)} is running on this machine to "
                    "redeem invitations; start one with `swarm-notebook serve MODEL --private`"
                )
            book.execute(
                "INSERT INTO invitations VALUES (?, ?, ?, ?, ?, 0, 0)",
                (made, secret, wanted, until, uses),
            )
        addresses = [address for text, _ in found for address in json.loads(text)][:MAX_ADDRESSES]
        model = found[0][1]
        return Invitation(self.swarm, made, secret, wanted, until, model, tuple(addresses))

    def redeem(self, request: bytes) -> bytes:
        """The answer to what somebody has sent to become a member, who may be anybody.

        Who asks again with the same key gets the same again: an answer may have been lost. Late in
        its term a membership is renewed by that, also when the invitation has expired or is spent.
        """
        asked, now = Redemption.unpack(request), int(time.time())
        if asked is None:
            return pack_answer(Ruling.UNKNOWN)
        with self._open() as book:
            # Strangers lock nobody out of the book.
            secret = book.execute(
                "SELECT secret FROM invitations WHERE id = ?", (asked.id,)
            ).fetchone()
            if secret is None or not asked.is_made_with(secret[0], self.swarm):
                return pack_answer(Ruling.UNKNOWN)
            book.execute("BEGIN IMMEDIATE")
            role, expires, uses, used, revoked = book.execute(
                "SELECT role, expires, uses, used, revoked FROM invitations WHERE id = ?",
                (asked.id,),
            ).fetchone()
            known = book.execute(
                "SELECT expires, revoked, invitation FROM members WHERE key = ?", (asked.member,)
            ).fetchone()
            if revoked or (known is not None and known[1]):
                return pack_answer(Ruling.REVOKED)
            if known is None or known[2] != asked.id:
                if expires < now:
                    return pack_answer(Ruling.EXPIRED)
                if used >= uses:
                    return pack_answer(Ruling.SPENT)
                book.execute("UPDATE invitations SET used = used + 1 WHERE id = ?", (asked.id,))
                until = now + MEMBER_SECONDS
                book.execute(
                    "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, 0)",
                    (asked.member, asked.id, role, now, until),
                )
            else:
                until = known[0]
                if until - now < RENEW_SECONDS:
                    until = now + MEMBER_SECONDS
                    book.execute(
                        "UPDATE members SET expires = ? WHERE key = ?", (until, asked.member)
                    )
        certificate = Certificate(Role(role), until, asked.member).signed(self._key)
        return pack_answer(Ruling.GRANTED, certificate)

    def members(self) -> list[Member]:
        """All who have joined, the latest last."""
        with self._open() as book:
            rows = book.execute(
                "SELECT key, invitation, role, joined, expires, revoked FROM members "
                "ORDER BY joined, rowid"
            ).fetchall()
        return [
            Member(key, invitation, Role(role), joined, expires, bool(revoked))
            for key, invitation, role, joined, expires, revoked in rows
        ]

    def revoke(self, name: str) -> list[Member]:
        """Shut somebody out; who that is.

        Args:
            name: a member's, as `members` shows it; or that of an invitation (or the invitation
                itself), which nobody can redeem then: all who have are shut out.

        Raises:
            InvitationError: nobody is called so, or too many were revoked.
        """
        name = Invitation.read(name).id.hex() if name.startswith("swarm1") else name.lower()
        with self._open() as book:
            book.execute("BEGIN IMMEDIATE")
            found = [
                key
                for key, invitation in book.execute("SELECT key, invitation FROM members")
                if name and (key.hex().startswith(name) or invitation.hex().startswith(name))
            ]
            invitations = [
                one
                for (one,) in book.execute("SELECT id FROM invitations")
                if name and one.hex().startswith(name)
            ]
            if not found and not invitations:
                raise InvitationError(
                    f"no member and no invitation is called {name!r}; `swarm-notebook members` "
                    "shows them"
                )
            book.executemany(
                "UPDATE members SET revoked = 1 WHERE key = ?", [(key,) for key in found]
            )
            book.executemany(
                "UPDATE invitations SET revoked = 1 WHERE id = ?", [(one,) for one in invitations]
            )
            if len(_revoked(book)) > MAX_REVOKED:
                raise InvitationError(
                    f"more than {MAX_REVOKED} members would be revoked at once; start a new swarm"
                )
        return [member for member in self.members() if member.key in found]

    def revocations(self) -> bytes:
        """The signed list of all who are revoked and whose certificates have not expired."""
        with self._open() as book:
            number = book.execute("SELECT COUNT(*) FROM members WHERE revoked").fetchone()[0]
            members = _revoked(book)
        return signed_revocations(self._key, number, members)

    def runs(self, peer: str, addresses: Sequence[str], model: str) -> None:
        """A server of the swarm is here, for invitations to lead to; to be said again and again."""
        if len(model.encode()) > MAX_NAME:
            model = ""
        with self._open() as book:
            book.execute(
                "INSERT OR REPLACE INTO servers VALUES (?, ?, ?, ?)",
                (peer, json.dumps(list(addresses)), model, int(time.time())),
            )

    def ends(self, peer: str) -> None:
        with self._open() as book:
            book.execute("DELETE FROM servers WHERE peer = ?", (peer,))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The book; what is done with it happens as a whole, or not at all."""
        book = sqlite3.connect(self._book, timeout=_LOCK_SECONDS)
        try:
            with book:
                yield book
        finally:
            book.close()


def _revoked(book: sqlite3.Connection) -> list[bytes]:
    rows = book.execute(
        "SELECT key FROM members WHERE revoked AND expires > ?", (int(time.time()),)
    )
    return [key for (key,) in rows]


def _secret_file(path: Path) -> bytes:
    """The 32 bytes in a file; drawn and written, for its owner alone, if it is not there."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    if not path.exists():
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        # Of several that begin at once one wins, and none reads half a key.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_bytes()


def swarms_folder() -> Path:
    """Where the swarms are that were begun on this machine, by name."""
    import platformdirs

    return Path(platformdirs.user_data_dir("swarm_notebook")) / "swarms"


def begun_here(name: str | None) -> Authority:
    """A swarm that was begun on this machine.

    Args:
        name: its folder's; None is the only one that there is.

    Raises:
        InvitationError: there is none, or are several.
    """
    folder = swarms_folder()
    known = sorted(path.name for path in folder.glob("*") if (path / "key").exists())
    if name is None and len(known) == 1:
        name = known[0]
    if name is None or not (folder / name / "key").exists():
        said = (
            f"this machine has {', '.join(known)}; name one with --swarm"
            if known
            else (
                "none was started on this machine; `swarm-notebook serve MODEL --private` starts "
                "one, and sn.LocalSwarm(private=True) one that ends with the notebook"
            )
        )
        raise InvitationError(f"no private swarm{'' if name is None else f' {name!r}'}: {said}")
    return Authority(folder / name)
