"""`serve --reproducible` on a card: bits of a session's rows do not depend on who else decodes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.company import outputs_of
from transformers import LlamaConfig

import swarm_notebook as sn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HIDDEN = 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_company(dtype: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config).save_pretrained(tmp_path)
    states = getattr(torch, dtype)
    dice = random.Random(0)
    with (
        sn.LocalSwarm(tmp_path, 1, device="cuda", dtype=dtype, reproducible=True) as servers,
        sn.connect(servers, device="cpu") as swarm,
    ):
        assert swarm.status().servers[0].engine_kind == "graph, reproducible"
        alone = outputs_of(swarm.connection, HIDDEN, [], states, prompt=250)
        for count in (0, 1, 5, 13, 40, 40):
            # Among them some that are longer, and some with another length of bucket.
            others = [dice.choice([3, 20, 100, 251, 700, 1300]) for _ in range(count)]
            among = outputs_of(swarm.connection, HIDDEN, others, states, prompt=250)
            assert all(map(torch.equal, alone, among)), f"with {count} others"
