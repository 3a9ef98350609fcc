"""A local model with a tokenizer: what widgets show of a model does not depend on where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from letters import add_tokenizer
from tiny import tiny_model


@dataclass
class Lettered:
    """The tiny Llama, held locally; each printable ASCII letter is a token."""

    model: Any
    tokenizer: Any


@pytest.fixture(scope="session")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Lettered:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("lettered")))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Lettered(model.requires_grad_(False), AutoTokenizer.from_pretrained(folder))
