"""A tokenizer for the tiny models, one token per printable ASCII letter, and a pair that has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.hosting import HostedSwarm
from support.pairs import SPANS, Pair, local_model
from support.tiny import tiny_model

import swarm_notebook as sn


@dataclass
class LetteredPair(Pair):
    """With the tokenizer."""

    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        super().__post_init__()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)


@dataclass
class Lettered:
    """The tiny Llama, held locally; each printable ASCII letter is a token."""

    model: Any
    tokenizer: Any


def lettered_model(parent: Path) -> Lettered:
    from transformers import AutoTokenizer

    folder = add_tokenizer(tiny_model("llama", parent))
    return Lettered(local_model(folder), AutoTokenizer.from_pretrained(folder))


@contextmanager
def lettered_pair(parent: Path) -> Iterator[LetteredPair]:
    folder = add_tokenizer(tiny_model("llama", parent))
    with (
        HostedSwarm(folder, SPANS) as servers,
        sn.connect(servers.initial_peers, model=folder) as swarm,
    ):
        yield LetteredPair(swarm, folder)


def add_tokenizer(folder: Path) -> Path:
    """Save the tokenizer beside a tiny model, whose vocabulary of 128 has room for it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *map(chr, range(32, 127)), "<unk>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder
