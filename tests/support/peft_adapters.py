"""An adapter on a local copy of a model, as PEFT makes it, and as it is uploaded."""

from __future__ import annotations

from typing import Any

import peft
import torch
from support.bench import Bench, LocalModel, layers_of, run_blocks
from support.raw_wire import RawClient
from torch import nn
from transformers import AutoModelForCausalLM

from swarm_notebook.client.adapters import AdaptedBlock, Adapter
from swarm_notebook.model.adapters.tuner_layers import describe
from swarm_notebook.net.wire import protocol
from swarm_notebook.server.adapters.file import parse_safetensors
from swarm_notebook.server.adapters.layers import parse_description
from swarm_notebook.server.adapters.upload import Upload, recipe_of

TARGETS = {
    "bloom": ("query_key_value", "dense_4h_to_h"),
    "gemma3_text": ("q_proj", "o_proj", "up_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen3_moe": ("q_proj", "o_proj"),
}


class Tuned:
    """A copy of a local model with an adapter, and the adapter as it is uploaded."""

    def __init__(self, bench: LocalModel, kind: str, seed: int = 0, **options: Any):
        torch.manual_seed(seed)
        whole = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
        targets = options.pop("target_modules", TARGETS[bench.family])
        if kind == "IA3Config":
            options["feedforward_modules"] = list(targets[-1:])
        config = getattr(peft, kind)(target_modules=list(targets), **options)
        self.bench = bench
        self.model: nn.Module = peft.get_peft_model(whole, config).eval().base_model.model
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter += 0.2 * torch.randn(parameter.shape)

    @property
    def adapter(self) -> Adapter:
        """Its present state."""
        names: Any = self.model.peft_config
        blocks = {}
        for index in range(1, 4):
            found = describe(layers_of(self.model)[index], index, set(names), set(names))
            if found is not None:
                blocks[index] = AdaptedBlock(found.text, found.tensors, found.trained)
        return Adapter("mine", 1, peft.__version__, blocks)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """What is trained in blocks 1 to 3, by the names that gradients have."""
        return self.adapter.trained(1, 4)

    def upload(
        self,
        name: str = "mine",
        version: int = 1,
        client: RawClient | None = None,
        packed: tuple[bytes, bytes] | None = None,
        **changes: Any,
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        parts = packed or self.adapter.packed(*changes.get("blocks", (1, 4)))
        sent = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]
        metadata = {"adapter": name, "version": version, **changes}
        assert isinstance(self.bench, Bench), "there is no server"
        return self.bench.call(protocol.RPC_ADAPTER, *sent, client=client, **metadata)

    def as_upload(self) -> Upload:
        """What a server makes of `upload`."""
        file, text = self.adapter.packed(1, 4)
        tensors = parse_safetensors(torch.frombuffer(bytearray(file), dtype=torch.uint8))
        layers = parse_description(text, (1, 4), tensors, peft.__version__)
        return Upload("mine", 1, recipe_of((1, 4), text, tensors), layers, tensors)

    def gradients(
        self, hidden: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Of the input, of the output of block 1, of the parameters."""
        hidden = hidden.clone().requires_grad_()
        outputs = run_blocks(self.model, 1, 4, hidden, attention_mask=mask)
        sources = [hidden, outputs[0], *self.parameters.values()]
        return list(torch.autograd.grad(outputs[-1], sources, grad))

    @torch.no_grad()
    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        return run_blocks(self.model, 1, 4, hidden)[-1]


def key(name: str = "mine", version: int = 1) -> dict[str, Any]:
    return {"id": name, "version": version}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
