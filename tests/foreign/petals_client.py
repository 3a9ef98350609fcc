"""Petals' own client on the servers of a swarm; run by the interpreter that has Petals.

    python petals_client.py FOLDER PREFIX ADDRESS…

It prints one JSON object: the name of each check, and true, or what went wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from petals import AutoDistributedModelForCausalLM
from transformers import AutoModelForCausalLM

folder, prefix, *peers = sys.argv[1:]
remote = AutoDistributedModelForCausalLM.from_pretrained(
    folder, initial_peers=peers, dht_prefix=prefix, torch_dtype=torch.float32, max_retries=3
)
local = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
length = {"max_new_tokens": 10, "min_new_tokens": 10}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def logits() -> bool:
    with torch.no_grad():
        return close(remote(ids).logits, local(ids).logits)


def greedy() -> bool:
    return remote.generate(ids, **length).tolist() == local.generate(ids, **length).tolist()


def beams() -> bool:
    options = {**length, "num_beams": 3}
    one = ids[:1]
    return remote.generate(one, **options).tolist() == local.generate(one, **options).tolist()


def one_session() -> bool:
    """Token by token over one session, as a chat goes on."""
    with torch.no_grad(), remote.transformer.h.inference_session(max_length=32):
        hidden = remote.transformer.word_embeddings(ids)
        parts = [remote.transformer.h(hidden[:, at : at + 3]) for at in (0, 3, 6)]
        got = remote.lm_head(remote.transformer.ln_f(torch.cat(parts, dim=1)))
        return close(got, local(ids).logits)


def two_turns() -> bool:
    with remote.inference_session(max_length=40):
        first = remote.generate(ids, max_new_tokens=4, min_new_tokens=4)
        second = remote.generate(max_new_tokens=4, min_new_tokens=4)
    whole = local.generate(ids, max_new_tokens=8, min_new_tokens=8)
    return torch.cat([first, second], dim=1).tolist() == whole.tolist()


def gradients() -> bool:
    found = []
    for model in (remote, local):
        embedded = model.get_input_embeddings()(ids).detach().clone().requires_grad_(True)
        model(inputs_embeds=embedded).logits.square().mean().backward()
        found.append(embedded.grad)
    return torch.allclose(*found, atol=1e-6, rtol=1e-3)


def streamed() -> bool:
    """More than a MiB goes in parts, there and back."""
    many = ids.repeat(32, 12)
    embedded = remote.get_input_embeddings()(many).detach().clone().requires_grad_(True)
    out = remote(inputs_embeds=embedded).logits
    out.square().mean().backward()
    own = embedded.detach().clone().requires_grad_(True)
    same = local(inputs_embeds=own).logits
    same.square().mean().backward()
    return close(out, same) and torch.allclose(embedded.grad, own.grad, atol=1e-6, rtol=1e-3)


def deep_prompts() -> bool:
    """Petals' own prompt tuning trains: the loss falls."""
    tuned = AutoDistributedModelForCausalLM.from_pretrained(
        folder,
        initial_peers=peers,
        dht_prefix=prefix,
        torch_dtype=torch.float32,
        tuning_mode="deep_ptune",
        pre_seq_len=4,
    )
    trained = [one for one in tuned.parameters() if one.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.05), []
    for _ in range(4):
        loss = tuned(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses[-1] < losses[0]


def outcome(check: Callable[[], bool]) -> Any:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]


checks = [logits, greedy, beams, one_session, two_turns, gradients, streamed, deep_prompts]
print(json.dumps({check.__name__: outcome(check) for check in checks}))
