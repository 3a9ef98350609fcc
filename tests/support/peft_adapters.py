"""An adapter on a local copy of a model, as PEFT makes it, and as it is uploaded."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save
from support.bench import Bench, LocalModel, layers_of, run_blocks
from support.raw_wire import RawClient
from torch import nn

from swarm_notebook.net import protocol
from swarm_notebook.server.adapters.config import parse_configs
from swarm_notebook.server.adapters.upload import Recipe, Upload

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
        import peft
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        whole = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
        targets = options.pop("target_modules", TARGETS[bench.family])
        if kind == "IA3Config":
            options["feedforward_modules"] = list(targets[-1:])
        config = getattr(peft, kind)(target_modules=list(targets), **options)
        self.bench = bench
        self.model: nn.Module = peft.get_peft_model(whole, config).eval().base_model.model
        layers = layers_of(self.model)
        self.prefix = next(name for name, module in self.model.named_modules() if module is layers)
        self.configs = {"default": json.dumps(config.to_dict(), default=plain)}
        self.parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            and int(name[len(self.prefix) :].split(".")[1]) in range(1, 4)
        }
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter += 0.2 * torch.randn(parameter.shape)

    def upload(
        self, name: str = "mine", version: int = 1, client: RawClient | None = None, **changes: Any
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        tensors = changes.pop("tensors", self.parameters)
        file = changes.pop("file", None)
        if file is None:
            file = save({key: value.detach().contiguous() for key, value in tensors.items()})
        metadata = {
            "adapter": name,
            "version": version,
            "configs": self.configs,
            "prefix": self.prefix,
            **changes,
        }
        packed = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        assert isinstance(self.bench, Bench), "there is no server"
        return self.bench.call(protocol.RPC_ADAPTER, packed, client=client, **metadata)

    def as_upload(self) -> Upload:
        """What a server makes of `upload`."""
        recipe = Recipe((1, 4), self.prefix, parse_configs(self.configs, max_rank=64))
        values = {name: value.detach() for name, value in self.parameters.items()}
        return Upload("mine", 1, recipe, values, frozenset())

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


def plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def key(name: str = "mine", version: int = 1) -> dict[str, Any]:
    return {"id": name, "version": version}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
