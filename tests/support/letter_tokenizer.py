"""A tokenizer for the tiny models, one token per printable ASCII letter, and a pair that has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.hosting import HostedSwarm
from support.tiny import tiny_model

import swarm_notebook as sn


@dataclass
class Pair:
    """The tiny Llama over two servers, and held locally."""

    swarm: Any
    local: Any
    tokenizer: Any
    folder: Path


@dataclass
class Lettered:
    """The tiny Llama, held locally; each printable ASCII letter is a token."""

    model: Any
    tokenizer: Any


def lettered_model(parent: Path) -> Lettered:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = add_tokenizer(tiny_model("llama", parent))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Lettered(model.requires_grad_(False), AutoTokenizer.from_pretrained(folder))


@contextmanager
def lettered_pair(parent: Path) -> Iterator[Pair]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = add_tokenizer(tiny_model("llama", parent))
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with (
        HostedSwarm(folder, [(0, 2), (2, 5)]) as servers,
        sn.connect(servers.initial_peers, model=folder) as swarm,
    ):
        local.requires_grad_(False)
        yield Pair(swarm, local, AutoTokenizer.from_pretrained(folder), folder)


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
