"""What a notebook holds: a model in a swarm, and the swarm behind it.

Magics, command line and widgets use only what is public here and in `connecting`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.client.connection import Connection
from swarm_notebook.client.servers import expected
from swarm_notebook.client.telemetry import MAX_EVENTS, Subscription
from swarm_notebook.local.swarm import LocalSwarm
from swarm_notebook.model import home, skeleton
from swarm_notebook.model.generation import drafting
from swarm_notebook.model.generation.drafting import Draft
from swarm_notebook.model.home import Blocks
from swarm_notebook.privacy import examine
from swarm_notebook.report.audit import AuditTable
from swarm_notebook.report.cost import Bill, Preview, bill_of, expect
from swarm_notebook.report.formatting import count, model_title
from swarm_notebook.report.privacy import Privacy
from swarm_notebook.report.route import RouteTable, route_of
from swarm_notebook.report.status import SwarmStatus, status_of
from swarm_notebook.report.trace import Trace, from_timeline
from swarm_notebook.writing.prompts import callback_streamer, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Swarm:
    """A model whose blocks are served by a swarm.

    Attributes:
        model: the Hugging Face model; its blocks run remotely.
        tokenizer: its tokenizer, or None if the model comes without one.
        name: the model's name.
        connection: how the servers are reached; what it offers may change with any version.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

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
        return f"<Swarm of {count(servers, 'server')}: {model_title(self.name)}>"

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

        Work for which other servers are at least twice as fast, such as a long prompt, goes there.

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
            loads=expected.loads(directory, chain, config.hidden_size, self.model.dtype),
            prompt_tokens=prompt_tokens,
            answered=expected.answered(directory, chain, prompt_tokens),
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
        directory = self.connection.directory
        spans = directory.snapshot.spans
        engines = {span.peer: span.info.engine for span in spans if span.info.engine}
        return from_timeline(self.name, directory.telemetry.latest, self.owned, engines)

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
        model.to(self.model.device)
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
