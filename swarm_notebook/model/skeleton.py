"""Builds the remote model: local edges, remote blocks, the model's own class around them."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors.torch import save_file
from transformers import GenerationMixin

from swarm_notebook.checkpoint.anatomy import context_length
from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.checkpoint.files.weights import SINGLE_FILE
from swarm_notebook.checkpoint.parts.partial import load_edges
from swarm_notebook.checkpoint.parts.single import BlockTensors
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.adapters.injected import Adapters
from swarm_notebook.model.blocks.placeholders import is_placeholder
from swarm_notebook.model.blocks.remote import swarm_class
from swarm_notebook.model.calls.decoder import DecoderCalls
from swarm_notebook.model.calls.runner import Runner
from swarm_notebook.model.generation import drafting
from swarm_notebook.model.generation.cache import RemoteCache, adopted
from swarm_notebook.model.home import empty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swarm_notebook.client.connection import Connection
    from swarm_notebook.client.telemetry import Timeline

# The generation under way in this thread.
_generation: ContextVar[Timeline | None] = ContextVar("generation", default=None)

_UNCOMPILED = (
    "torch.compile(fullgraph=True): blocks run on servers and cannot be part of a graph; leave "
    "fullgraph out"
)

# Of names in a model as it is, and with PEFT's around it, with a tuner or without.
_AROUND = ("", "base_model.model.", "base_model.")


class RemoteModel:
    """Mixed into the model's class, in front of it."""

    _runner: Runner

    # An interrupt ends here without the frames in between: they say nothing to the user, would keep
    # the cache alive, and a notebook takes seconds to show them.

    # Torch compiles around it, and gives the reason where it may not (`fullgraph=True`).
    @torch.compiler.disable(reason=_UNCOMPILED)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = self._runner.calls.kept
        outer = kept.begin(self, kwargs)  # type: ignore[arg-type]
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
            kept.check(output)
        except KeyboardInterrupt as interrupt:
            self._runner.calls.end()  # torch runs the hooks that close a call after errors only
            raise interrupt.with_traceback(None) from None
        finally:
            kept.go_on(outer)
        return output

    def compile(self, *args: Any, fullgraph: bool = False, **kwargs: Any) -> None:
        """As `torch.compile` of the model: blocks run on servers, and the call stays as it is.

        Raises:
            Unsupported: it is to be one graph.
        """
        if fullgraph:
            raise Unsupported(_UNCOMPILED)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Before pickle finds, and says, only that it cannot import this class.
        return self._runner.__reduce__()

    def __copy__(self) -> RemoteModel:
        return self._twin(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteModel:
        memo[id(self)] = twin = self._twin({})
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _twin(self, state: dict[str, Any]) -> RemoteModel:
        twin = object.__new__(type(self))
        twin.__dict__.update(state)
        return twin

    def train(self, mode: bool = True) -> Any:
        """As of every module; dropout inside of remote blocks stays off, which is said once."""
        if mode:
            self._runner.warn_of_dropout()
        return super().train(mode)  # type: ignore[misc]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What `DistributedDataParallel` is to leave alone: it is frozen, alike everywhere, and not
        here.
        """
        named: Any = [*self.named_parameters(), *self.named_buffers()]  # type: ignore[attr-defined]
        remote = [name for name, tensor in named if is_placeholder(tensor)]
        return [prefix + name for prefix in _AROUND for name in remote]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Write what is here.

        With all blocks at home that is the model, as transformers saves it. Else it is
        ``model.safetensors`` with the weights outside of the blocks and those of the blocks at
        home, without a config, as it is no model by itself; ``load_state_dict(…, strict=False)``
        takes it, where the same blocks are at home.

        Raises:
            Unsupported: nothing here can differ from the checkpoint.
        """
        runner = self._runner
        if len(runner.home) == len(runner.blocks):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return
        parameters: Any = self.parameters()  # type: ignore[attr-defined]
        if not runner.home and not any(one.requires_grad for one in parameters):
            raise Unsupported(
                "the weights of a remote model are on the servers; save_pretrained of its PEFT "
                "adapter works, and of blocks that came home (swarm.own(block)); for the weights "
                "use the checkpoint itself"
            )
        state = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
        # Tied weights are one tensor of two names, which safetensors does not take.
        once = {(value.data_ptr(), value.shape): name for name, value in reversed(state.items())}
        kept = {name: state[name].detach().contiguous() for name in once.values()}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kept, folder / SINGLE_FILE, {"format": "pt"})


class RemoteGenerator(RemoteModel):
    """The same for a model that generates."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        outer = _generation.set(None)
        try:
            found = super().generate(*args, **kwargs)  # type: ignore[misc]
            timeline = _generation.get()
        except KeyboardInterrupt as interrupt:
            cache = self._runner.generating
            if cache is not None:
                cache.leave()
            raise interrupt.with_traceback(None) from None
        finally:
            _generation.reset(outer)
        given: Any = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        written = getattr(found, "sequences", found)
        if timeline is not None and all(isinstance(ids, torch.Tensor) for ids in (given, written)):
            timeline.written = written.shape[-1] - given.shape[-1]
        return found

    def new_cache(self, max_length: int | None = None) -> RemoteCache:
        """An empty cache, to be given to several calls of the model or of ``generate``.

        Args:
            max_length: tokens that Petals' servers are to reserve; ours need not know.
        """
        return RemoteCache(self._runner.connection, max_length=max_length)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        given = adopted(model_kwargs.get("past_key_values"), self._runner.connection)
        if given is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise Unsupported(
                    f"cache_implementation={generation_config.cache_implementation!r}: the keys "
                    "and values of remote blocks are kept by their servers; leave it out"
                )
            cache = RemoteCache(self._runner.connection, max_length=max_cache_length + 1)
            _generation.set(cache.session.begin_generation())
            model_kwargs["past_key_values"] = cache
            self._runner.generating = cache
            return
        if isinstance(given, RemoteCache):
            _generation.set(given.session.begin_generation())
            self._runner.generating = given
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """What ``generate_batch`` begins with: it would page keys and values that are not here.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(
            "continuous batching (generate_batch): the servers batch sessions themselves; call "
            "generate with a padded batch, or from several threads"
        )

    def _get_candidate_generator(
        self, generation_config: Any, *, logits_processor: Any, **options: Any
    ) -> Any:
        found = drafting.chosen_generator(self, generation_config, logits_processor)
        return found or super()._get_candidate_generator(  # type: ignore[misc]
            generation_config=generation_config, logits_processor=logits_processor, **options
        )


@functools.cache
def _remote_model_class(model_class: type) -> type:
    mixin = RemoteGenerator if issubclass(model_class, GenerationMixin) else RemoteModel
    # The name stays: Trainer (label smoothing) and pipelines go by it.
    return type(
        model_class.__name__,
        (mixin, model_class),
        {
            "__module__": model_class.__module__,
            "__qualname__": f"Remote{model_class.__qualname__}",
            "__doc__": model_class.__doc__,
            # Whoever makes another one of it (`type(model).from_pretrained(…)`) gets a local model.
            "__new__": lambda _cls, *args, **kwargs: model_class(*args, **kwargs),
        },
    )


def build(
    source: ModelSource, connection: Connection, dtype: torch.dtype, labels: Sequence[str] = ()
) -> PreTrainedModel:
    """The model of `source` with embeddings, norm and head here and its blocks in the swarm.

    Args:
        labels: names of classes, for a sequence classifier in the place of the language model.
    """
    loaded, info = load_edges(source, dtype=dtype, labels=labels)
    model: Any = loaded
    model.__class__ = _remote_model_class(type(loaded))  # type: ignore[arg-type]
    model._tensors = BlockTensors(source, loaded)
    blocks: list[Any] = list(info.layers)
    calls = DecoderCalls(
        info.decoder,
        info.layers_name,
        blocks,
        connection,
        Adapters(loaded),
        context_length=context_length(model.config),
    )
    runner = Runner(calls, returns_tuple=info.returns_tuple)
    for index, block in enumerate(blocks):
        block.__class__ = swarm_class(type(block), own=False)  # type: ignore[arg-type]
        empty(model, block, index)
        block.attach(runner, index)
    model._runner = runner
    return loaded
