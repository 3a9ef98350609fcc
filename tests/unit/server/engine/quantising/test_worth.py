"""What choosing bits by measuring is worth, on the demo model: against 4 bits for all.

All blocks at 4.5 bits, on two texts that nothing was chosen by (113 and 1,024 tokens): 0.175 and
0.134 nats per token where 4 bits for all lose 0.371 and 0.339. Of the first two blocks alone, on
the text here: 0.0044 and 0.0166, in a tenth of the time.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from swarm_notebook.checkpoint.files import demo
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.server.engine.quantising.loading import load_quantised

BITS, BLOCKS, GROUP = 4.5, 2, 64

TEXT = """A lighthouse keeper wrote every evening what he had seen: two ships to the north, a seal
on the rocks, the wind from the west. After forty years there were three hundred notebooks on his
shelf, and nobody had read them. His granddaughter was the first. She found that the seals had come
two weeks earlier each decade, and that in 1962 there had been no ships at all for nineteen days,
because the harbour was on strike. She sent a copy to the university, where it became the longest
record of its kind."""


def four_bits_for_all(weight: torch.Tensor) -> torch.Tensor:
    """Rounded in groups to sixteen values between the smallest and the largest: 4.5 bits each.

    Scale and offset are float16.
    """
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    offset = groups.amin(-1, keepdim=True).half().float()
    scale = ((groups.amax(-1, keepdim=True) - offset) / 15).half().float()
    rounded = ((groups - offset) / scale.clamp_min(1e-8)).round().clamp(0, 15)
    return (rounded * scale + offset).reshape(weight.shape)


@pytest.mark.skipif(
    importlib.util.find_spec(demo.DEMO_PACKAGE) is None, reason=f"needs `{demo.INSTALL}`"
)
@torch.inference_mode()
def test_measured_bits_lose_a_third_less_than_4_bits_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(demo.demo_model())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # it is measured anew
    loaded, told = load_quantised(source, 0, BLOCKS, bits=BITS, dtype=torch.float32)
    whole: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    chosen, uniform = copy.deepcopy(whole), copy.deepcopy(whole)
    for packed, ours, theirs in zip(
        loaded.layers, chosen.model.layers, uniform.model.layers, strict=False
    ):
        for name, parameter in packed.named_parameters():
            if isinstance(parameter, PackedWeight):
                ours.get_parameter(name).copy_(parameter.unpack())
                theirs.get_parameter(name).copy_(four_bits_for_all(theirs.get_parameter(name)))
    ids = torch.tensor([source.tokenizer()(TEXT)["input_ids"]])
    expected, *found = [
        model(ids, use_cache=False).logits.log_softmax(-1) for model in (whole, chosen, uniform)
    ]
    ours, theirs = [
        float(kl_div(one, expected, log_target=True, reduction="sum")) / ids.shape[1]
        for one in found
    ]
    assert told.bits <= BITS
    assert 0 < ours < 0.7 * theirs
