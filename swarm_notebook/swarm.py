"""What a notebook holds: a model in a swarm, and the swarm behind it.

`connect` joins a swarm (or starts an embedded one, of server processes on this machine), builds
the remote model and returns a `Swarm`. Magics, command line and widgets use only what is public
here.
"""

from __future__ import annotations

import contextvars
import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from swarm_notebook.checkpoint.digest import digest
from swarm_notebook.checkpoint.source import ModelSource, resolve
from swarm_notebook.client.connection import Connection
from swarm_notebook.client.discovery import await_spans, choose_dtype, only_model, only_record
from swarm_notebook.client.servers.directory import PATIENCE
from swarm_notebook.client.telemetry import MAX_EVENTS, Subscription
from swarm_notebook.local.swarm import LocalSwarm
from swarm_notebook.model import home, skeleton
from swarm_notebook.model.generation import drafting
from swarm_notebook.model.generation.drafting import Draft
from swarm_notebook.model.home import Blocks
from swarm_notebook.model.judge import HomeJudge
from swarm_notebook.net.addresses import addresses_of, is_public
from swarm_notebook.net.membership.invitation import Invitation, is_invitation
from swarm_notebook.net.tensors import COMPRESSIONS, NONE
from swarm_notebook.privacy import examine
from swarm_notebook.progress import Waiting
from swarm_notebook.report.audit import AuditTable
from swarm_notebook.report.cost import Bill, Preview, bill_of, expect
from swarm_notebook.report.privacy import Privacy
from swarm_notebook.report.route import RouteTable, route_of
from swarm_notebook.report.status import SwarmStatus, status_of
from swarm_notebook.report.trace import Trace, from_timeline
from swarm_notebook.writing.prompts import callback_streamer, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swarm_notebook.net.records import ServerSpan

logger = logging.getLogger(__name__)

# Weights of fewer bits than these were made coarser by their server.
WHOLE_BITS = 16


# Of what is computed anyway: a fiftieth is lost among the differences between two runs, and who
# always answers wrong is found after 50 requests on average, a new server sooner (`choice`).
SPOT_RATE = 0.02


_SOON = 1.0  # seconds in which the cell that connects has put the new swarm into its variable


class Swarm:
    """A model whose blocks are served by a swarm.

    Attributes:
        model: the Hugging Face model; its blocks run remotely.
        tokenizer: its tokenizer, or None if the model comes without one.
        name: the model's name.
        connection: how the servers are reached; what it offers may change with any version.
    """

    def __init__(
        self,
        source: ModelSource,
        model: PreTrainedModel,
        connection: Connection,
        local: LocalSwarm | None,
    ):
        self.name, self.model, self.tokenizer = source.name, model, source.tokenizer()
        self.connection = connection
        self._source, self._local = source, local

    def __repr__(self) -> str:
        servers = len({span.peer for span in self.connection.directory.snapshot.spans})
        return f"<Swarm of {servers} server{'' if servers == 1 else 's'}: {self.name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    @property
    def initial_peers(self) -> list[str]:
        """Addresses by which others can join this swarm, as far as this notebook was given them."""
        return self.connection.initial_peers

    @property
    def connected(self) -> bool:
        """Whether `disconnect` has not been called yet."""
        return self.connection.is_open

    def status(self, *, refresh: bool = True) -> SwarmStatus:
        """Who serves which blocks.

        Args:
            refresh: ask the swarm now; else tell at once what was known seconds ago.
        """
        if refresh:
            self.connection.refresh()
        return status_of(self.name, self.connection.directory)

    def route(self) -> RouteTable:
        """The servers that the next new request takes.

        Raises:
            MissingBlocks: no server holds some of the blocks.
        """
        return route_of(self.name, self.connection.directory)

    def info(self, peer_id: str) -> dict[str, Any]:
        """What a server says of itself when it is asked, such as its sessions and free memory.

        Args:
            peer_id: as `status` shows it.

        Raises:
            ServerFailed: it does not answer.
            ValueError: this is no peer's id.
        """
        return self.connection.info(peer_id)

    def preview(
        self, *, prompt_tokens: int, max_new_tokens: int, batch: int = 1, own: Blocks = ()
    ) -> Preview:
        """What a generation will take on the present route; asks the network nothing.

        Args:
            prompt_tokens: tokens of each prompt, padding included.
            max_new_tokens: tokens to generate, one pass each.
            batch: sequences that are generated together.
            own: blocks as for `own`, as if they had come home, too.

        Raises:
            BlocksOutOfRange: the model has no such block.
            ValueError: a number is below 1.
            MissingBlocks: no server holds some of the blocks.
        """
        directory = self.connection.directory
        config: Any = self.model.config.get_text_config()
        blocks = self._runner.blocks
        wanted = [] if own == () else home.which(own, len(blocks))
        at_home = directory.home | frozenset(wanted)
        chain = directory.route(at_home)
        return expect(
            self.name,
            chain,
            directory.links,
            directory.telemetry.usage.by_peer(),
            loads=directory.loads(chain, config.hidden_size, self.model.dtype),
            prompt_tokens=prompt_tokens,
            answered=directory.answered(chain, prompt_tokens),
            max_new_tokens=max_new_tokens,
            batch=batch,
            home={index: home.weight_bytes(blocks[index]) for index in at_home},
        )

    def bill(self) -> Bill:
        """What was used since this notebook was attached, and by whom activations were seen.

        ``swarm.bill() - before``, with an earlier bill, is what was used since then.
        """
        return bill_of(self.name, self.connection.directory.telemetry.usage.by_peer())

    def trace(self) -> Trace:
        """Where the time of the last generation went: notebook, network, each server."""
        return from_timeline(self.name, self.connection.directory.telemetry.latest, self.owned)

    def audit(self, wait: float = 0.0) -> AuditTable:
        """What was audited of what servers answered: who agreed, who was found wrong.

        Args:
            wait: seconds to wait at most for audits that are under way.
        """
        if wait:
            self.connection.await_audits(wait)
        auditor = self.connection.auditor
        if auditor is None:
            return AuditTable(self.name, 0.0, ())
        known = self.connection.directory.digest or ""
        return AuditTable(self.name, auditor.rate, auditor.verdicts.all(), known)

    def privacy(
        self,
        text: str | Sequence[int],
        *,
        tokens: int = 32,
        boundaries: Sequence[int] | None = None,
        candidates: int = 1024,
    ) -> Privacy:
        """What the servers of the present route can read of a text, found out by trying.

        The text is run once. Then its states at each block boundary are attacked as a server
        could: the nearest entries of the vocabulary, and at some boundaries greedy inversion,
        which loads the blocks before them (see `model.inversion`). The attack knows the public
        weights only. What hooks of yours change in the states makes it find less than a server
        that knows them could.

        Args:
            text: or its token ids.
            tokens: how many of its first tokens are attacked.
            boundaries: where greedy inversion is tried, by how many blocks the states have been
                through; None is 1, 2 and 4, and the first states that a server sees.
            candidates: guesses that are tested for each token at most.

        Raises:
            ValueError: the text is empty, or a number is out of range.
            MissingBlocks: no server holds some of the blocks.
            Unsupported: an adapter or deep prompts are active: switch them off for it.
        """
        return examine(
            self.model,
            self._source,
            self.tokenizer,
            self.connection.directory,
            text,
            tokens=tokens,
            boundaries=boundaries,
            candidates=candidates,
        )

    def events(self, size: int = MAX_EVENTS) -> Subscription:
        """Tokens that pass and servers that are lost, from now on, to be read in any thread.

        Args:
            size: how many events wait at most; the oldest are forgotten first.
        """
        return self.connection.directory.telemetry.subscribe(size)

    def generate(
        self,
        prompt: str,
        *,
        chat: bool = True,
        stream: Callable[[str], None] | None = None,
        draft: Draft = None,
        **generate_kwargs: Any,
    ) -> str:
        """Continue a text, or answer it as a chat message where the tokenizer has a template.

        Args:
            prompt: the text.
            chat: apply the tokenizer's chat template, if there is one.
            stream: called with each piece of text as it comes.
            draft: guess tokens ahead and verify several in one pass; the outcome is exact. A
                number guesses as many by looking up how the text went on before, ``"auto"``
                chooses the number as it goes, a small model of the same vocabulary guesses
                itself. None guesses nothing, and so do modes without drafts (beams).
            generate_kwargs: as for ``model.generate``; ``temperature=0`` is greedy.

        Returns:
            The new text, without the prompt and without special tokens.

        Raises:
            ValueError: the model has no tokenizer, or ``draft`` is none of these.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} comes without a tokenizer; call model.generate(ids)")
        tokenizer: Any = self.tokenizer
        if stream is not None:
            generate_kwargs["streamer"] = callback_streamer(tokenizer, stream)
        if generate_kwargs.get("temperature") == 0:
            del generate_kwargs["temperature"]
            generate_kwargs["do_sample"] = False
        inputs = encode(tokenizer, prompt, chat=chat).to(self.model.device)
        model: Any = self.model
        with drafting.drafts(draft, generate_kwargs):
            output = model.generate(**inputs, **generate_kwargs)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    @property
    def owned(self) -> tuple[int, ...]:
        """The blocks that are at home: they run in this notebook."""
        return tuple(sorted(self._runner.home))

    @property
    def _runner(self) -> Any:
        return self.model._runner

    def own(self, blocks: Blocks) -> None:
        """Bring blocks home: load their weights from the checkpoint and run them here.

        Inside of a block at home everything works that torch can do to a module: hooks that
        write, replaced modules, changed weights, gradients, training of all its weights,
        attention weights. It takes the memory of the block's weights, and one more trip per token
        for each stretch of blocks at home. Caches that were filled before are not continued.

        Args:
            blocks: a block, a list, a range or a slice; negative numbers count from the end.

        Raises:
            BlocksOutOfRange: the model has no such block.
            ModelNotFound: the checkpoint lacks their weights.
            Unsupported: their weights are quantised.
        """
        home.bring_home(self.model, self._source, home.which(blocks, len(self._runner.blocks)))
        self.connection.directory.home = self._runner.home

    def release(self, blocks: Blocks | None = None) -> None:
        """Let blocks run on the servers again; what was changed in their weights is lost.

        Args:
            blocks: as for `own`; None releases all.

        Raises:
            BlocksOutOfRange: the model has no such block.
        """
        count = len(self._runner.blocks)
        home.send_away(self.model, range(count) if blocks is None else home.which(blocks, count))
        self.connection.directory.home = self._runner.home

    def classifier(self, labels: Sequence[str]) -> PreTrainedModel:
        """The same remote blocks with a sequence classifier's head, to be trained here.

        The model is of the family's own class, such as ``LlamaForSequenceClassification``. Its
        head is new (and drawn from torch's seed) unless the checkpoint has one; train it alone, or
        with PEFT's ``task_type="SEQ_CLS"``. Embeddings are shared with `model`; the blocks that
        are at home are loaded once more.

        With one label it gives one number for each text, ``[batch, 1]``: a regression, or the
        reward of a reward model.

        Args:
            labels: the names of the classes, or one name of what the number stands for.

        Raises:
            ValueError: no label, or one twice.
            Unsupported: transformers has no sequence classifier for this family.
        """
        labels = list(labels)
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(
                f"labels: {labels!r}; give different names of classes, or one name for a number "
                "(regression, rewards)"
            )
        dtype = self.model.dtype
        model: Any = skeleton.build(self._source, self.connection, dtype, labels)
        home.bring_home(model, self._source, self.owned)
        model.get_input_embeddings().weight = self.model.get_input_embeddings().weight
        if model.config.pad_token_id is None and self.tokenizer is not None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def disconnect(self) -> None:
        """Leave the swarm; an embedded one ends. The model cannot be used afterwards."""
        self.connection.close()
        if self._local is not None:
            self._local.close()


def connect(
    initial_peers: Sequence[str] | str | LocalSwarm | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    timeout: float = PATIENCE,
    compression: str | None = None,
    own: Blocks = (),
    min_bits: float | None = None,
    verify: str | float | None = None,
    verify_here: bool = False,
) -> Swarm:
    """Attach to a swarm and build the remote model.

    Args:
        initial_peers: multiaddrs of one or more peers, an invitation to a private swarm, or a
            `LocalSwarm`. None starts an embedded swarm: two server processes on this machine.
        model: a Hub id, a folder or a GGUF file, as the servers were given it; its embeddings,
            norm and head are loaded here. None takes the demo model for an embedded swarm, else
            what an invitation names, or the one model that the swarm serves.
        dtype: of the local part, such as ``"float32"``; None takes what the servers compute in.
        timeout: seconds to wait for a server when some blocks have none, and for one at all after
            the swarm was joined.
        compression: of hidden states on their way: None sends them as the servers compute,
            ``"float16"`` halves float32, ``"int8"`` sends 9 bits per value, which shifts the
            logits a little (Petals servers do without it). Passes that a backward follows are
            never compressed.
        own: blocks to bring home at once, see `Swarm.own`; no server needs to hold them.
        min_bits: servers whose weights have fewer bits each are not used, also not when others are
            lost: 16 takes whole weights only. None takes all, and says so once.
        verify: how much of what servers answer is audited: replayed on other servers in the
            background, see `Swarm.audit`. ``"spot"`` computes `SPOT_RATE` more for it, ``"off"``
            nothing, a number such a share. None is ``"spot"`` for peers with public addresses,
            else ``"off"``. It keeps one more hidden state per token of a text.
        verify_here: load blocks for a moment, one by one, to decide here what servers disagree on
            or what no other server can replay.

    Raises:
        AddressError, ConnectionFailed: the peers cannot be reached.
        InvitationError: the invitation is no whole one, or is refused.
        NotAMember: the swarm is private, and there is no invitation, or it holds no more.
        ModelNotFound, ModelNotServed: the model does not exist, or nobody serves it.
        OtherCheckpoint: it is served with other weights, or another config.
        ValueError: ``compression`` or ``verify`` is none of these.
    """
    rate = _audit_rate(verify, initial_peers)
    if compression is not None and compression not in COMPRESSIONS:
        raise ValueError(
            f"compression: {compression!r}, expected {' or '.join(map(repr, COMPRESSIONS))} or None"
        )
    local: LocalSwarm | None = None
    connection: Connection | None = None
    try:
        if initial_peers is None:
            local = LocalSwarm(model)
            initial_peers = local.initial_peers
            model = local.model
        if isinstance(initial_peers, LocalSwarm):
            model = initial_peers.model if model is None else model
            local_peers = initial_peers
            initial_peers = (
                [local_peers.invite()] if local_peers.private else local_peers.initial_peers
            )
        peers = [initial_peers] if isinstance(initial_peers, str) else list(initial_peers)
        if model is None:
            # Its folder or file, which no record tells.
            model = LocalSwarm.model_at(addresses_of(peers)) or _invited_to(peers)
        with Waiting("Joining the swarm") as waiting:
            source = resolve(model if model is not None else only_model(peers))
            config = source.config()
            blocks = config.num_hidden_layers
            connection = Connection(peers, source.dht_prefix, blocks, timeout, digest(source))
            owned = home.which(own, blocks) if own != () else []
            connection.directory.home = frozenset(owned)
            connection.directory.compression = COMPRESSIONS.get(compression or "", NONE)
            connection.directory.min_bits = min_bits or 0.0
            spans = await_spans(connection, source.name, peers, waiting)
            if min_bits is None:
                _tell_coarse(spans)
            waiting.say("Loading what runs here: embeddings, norm and head")
            built = skeleton.build(source, connection, choose_dtype(dtype, spans))
        home.bring_home(built, source, owned)
        if rate:
            connection.audit(rate, HomeJudge(source) if verify_here else None)
        _hold(connection, local)
        return Swarm(source, built, connection, local)
    except BaseException:
        if connection is not None:
            connection.close()
        if local is not None:
            local.close()
        raise


# Embedded swarms, by the connection that keeps them: a `Swarm` and its model both hold it.
_embedded: weakref.WeakKeyDictionary[Connection, LocalSwarm] = weakref.WeakKeyDictionary()


def _hold(connection: Connection, local: LocalSwarm | None) -> None:
    """Let an embedded swarm end with the last that uses it, and tell which of before still run."""
    if local is None:
        return
    connection.end_with_me(local.close)
    _embedded[connection] = local
    run = contextvars.copy_context().run  # the words belong to the cell that connects
    timer = threading.Timer(_SOON, run, [_tell_others])
    timer.daemon = True
    timer.start()


def _tell_others() -> None:
    gc.collect()  # models are full of circles; what nobody holds ends here
    running = [local for connection, local in _embedded.items() if connection.is_open]
    others = len(running) - 1
    if others > 0:
        logger.warning(
            "%s of before still %s, with server processes of %s: something holds %s model. "
            "disconnect() on the earlier Swarm ends it",
            "an embedded swarm" if others == 1 else f"{others} embedded swarms",
            "runs" if others == 1 else "run",
            ", ".join(sorted({Path(local.model).name for local in running})),
            "its" if others == 1 else "their",
        )


def _invited_to(peers: Sequence[str]) -> str | None:
    """The model that an invitation names."""
    named = (Invitation.read(peer).model for peer in peers if is_invitation(peer))
    return next((model for model in named if model), None)


def _tell_coarse(spans: Sequence[ServerSpan]) -> None:
    """Say that results will not be those of the model's own weights."""
    coarse = [span for span in spans if span.weight_bits < WHOLE_BITS]
    if coarse:
        least = min(span.weight_bits for span in coarse)
        logger.warning(
            "%d of %d servers have weights of %.3g bits or more: results differ from those of the "
            "model's own. sn.connect(min_bits=16) takes whole weights only, min_bits=%.3g takes "
            "these without a word",
            len(coarse),
            len(spans),
            least,
            least,
        )


def _audit_rate(
    verify: str | float | None, peers: Sequence[str] | str | LocalSwarm | None
) -> float:
    """Which share of the work is audited.

    Raises:
        ValueError: ``verify`` says nothing of the kind.
    """
    if verify is None:
        given = None if isinstance(peers, LocalSwarm) else peers
        listed = addresses_of(given or [])
        verify = "spot" if any(is_public(str(peer)) for peer in listed) else "off"
    if isinstance(verify, str) and verify in ("spot", "off"):
        return SPOT_RATE if verify == "spot" else 0.0
    if isinstance(verify, (int, float)) and not isinstance(verify, bool) and 0 <= verify <= 1:
        return float(verify)
    raise ValueError(f"verify: {verify!r}, expected 'spot', 'off' or a share from 0 to 1")


def look(
    initial_peers: Sequence[str] | str, *, model: str | os.PathLike[str] | None = None
) -> SwarmStatus:
    """Who serves which blocks of a model, without attaching to it.

    Args:
        initial_peers: multiaddrs of one or more peers of the swarm, or an invitation.
        model: as the servers were given it; None takes the one model that the swarm serves.

    Raises:
        AddressError, ConnectionFailed: the peers cannot be reached.
        ModelNotServed: the swarm serves several models, or none.
    """
    peers = [initial_peers] if isinstance(initial_peers, str) else list(initial_peers)
    if model is None:
        name, record = only_record(peers)
        prefix, blocks = name, record.num_blocks
    else:
        source = resolve(model)
        name, prefix, blocks = source.name, source.dht_prefix, source.config().num_hidden_layers
    connection = Connection(peers, prefix, blocks)
    try:
        return status_of(name, connection.directory)
    finally:
        connection.close()
