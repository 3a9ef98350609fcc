"""PEFT's adapters on remote blocks, against the same on the local model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, KasaConfig, LoraGAConfig, MontecloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.hotswap import hotswap_adapter
from support.pairs import Pair, close
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swarm_notebook.errors import Unsupported

TARGETS = ["q_proj", "v_proj", "down_proj"]
OWN = r"swarm\.own"


def tuned(pair: Pair, config: Any, name: str = "default") -> list[Any]:
    return [adapted(model, copy.deepcopy(config), name) for model in pair.models()]


def noisy(model: Any, part: str = "") -> Any:
    """The same with all that is trained moved from where it begins."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, one in sorted(model.named_parameters()):
            if one.requires_grad and part in name:
                one.add_(0.05 * torch.randn(one.shape, generator=generator))
    return model.eval()


def adapted(model: Any, config: Any, name: str = "default") -> Any:
    torch.manual_seed(4)
    return noisy(peft.get_peft_model(model, config, adapter_name=name))


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(3, 128, (rows, 9), generator=torch.Generator().manual_seed(1))


def padded() -> dict[str, torch.Tensor]:
    ids, mask = tokens(), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def same(models: list[Any], **options: Any) -> torch.Tensor:
    ours, theirs = (model(tokens(), **options).logits for model in models)
    close(ours, theirs)
    return ours


def same_training(models: list[Any], **options: Any) -> None:
    """Losses and the gradients of all that is trained."""
    losses, gradients = [], []
    for model in models:
        loss = model(**padded(), **options).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert any(grad is not None and grad.norm() > 0 for grad in theirs.values())
    for name, grad in theirs.items():
        mine = ours[name]
        if grad is None:
            assert mine is None, name
        else:
            assert mine is not None, name
            assert (mine - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


def same_generation(models: list[Any], **options: Any) -> None:
    fixed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    inputs = padded()
    del inputs["labels"]
    ours, theirs = (model.generate(**inputs, **fixed, **options) for model in models)
    assert ours.tolist() == theirs.tolist()


KINDS: dict[str, Any] = {
    "adalora": peft.AdaLoraConfig(total_step=1, target_modules=TARGETS),
    "boft": peft.BOFTConfig(target_modules=TARGETS),
    "delora": peft.DeloraConfig(target_modules=TARGETS),
    "hira": peft.HiraConfig(target_modules=TARGETS),
    "supertuning": peft.SupertuningConfig(target_modules=TARGETS),
    "c3a": peft.C3AConfig(block_size=1, target_modules=TARGETS),
    "fourierft": peft.FourierFTConfig(n_frequency=10, target_modules=TARGETS),
    "frod": peft.FrodConfig(target_modules=TARGETS),
    "hra": peft.HRAConfig(target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "ln tuning": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(target_modules=TARGETS),
    "lokr": peft.LoKrConfig(target_modules=TARGETS),
    "miss": peft.MissConfig(r=2, target_modules=TARGETS),
    "oft": peft.OFTConfig(target_modules=TARGETS),
    "osf": peft.OSFConfig(target_modules=TARGETS),
    "randlora": peft.RandLoraConfig(r=8, target_modules=TARGETS),
    "shira": peft.ShiraConfig(r=1, target_modules=TARGETS),
    "trainable tokens": peft.TrainableTokensConfig(target_modules=["q_proj"], token_indices=[1]),
    "vblora": peft.VBLoRAConfig(vector_length=1, num_vectors=4, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "dora": lora(use_dora=True),
    "rslora, patterns": lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v": 3}),
    "some layers": lora(layers_to_transform=[1, 3], exclude_modules=["v_proj"], lora_bias=False),
    "a head": lora(modules_to_save=["lm_head"], trainable_token_indices=[3, 4]),
    "bare parameters": lora(target_parameters=["mlp.up_proj.weight"]),
}


@pytest.mark.works("PEFT: nearly every adapter type, in values, gradients and training")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(pair: Pair, kind: str) -> None:
    models = tuned(pair, KINDS[kind])
    same_training(models)
    same(models)


@pytest.mark.works("PEFT: adapters in generation, with beams")
def test_a_name_with_a_hyphen_generates(pair: Pair) -> None:
    models = tuned(pair, lora(task_type="CAUSAL_LM"), name="my-adapter")
    same_generation(models)
    same_generation(models, num_beams=2)


def test_weights_begin_as_they_do_locally(pair: Pair) -> None:
    """DoRA takes the norms of the base weights, which are read for it."""
    ours, theirs = (peft.get_peft_model(one, lora(use_dora=True)) for one in pair.models())
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            close(ours.get_parameter(name), parameter)


def layer(model: Any) -> Any:
    return model.base_model.model.model.layers[2].self_attn.q_proj


def scale_all(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(2)


def unscale_one(model: Any) -> None:
    scale_all(model)
    layer(model).unscale_layer(2)


STATES: dict[str, Callable[[Any], None]] = {
    "set_scale": lambda model: layer(model).set_scale("default", 3.0),
    "scaling": lambda model: layer(model).scaling.update(default=0.3),
    "scale_layer": scale_all,
    "unscale_layer": unscale_one,
    "enable_adapters": lambda model: layer(model).enable_adapters(False),
    "set_adapter": lambda model: layer(model).set_adapter([]),
}


@pytest.mark.works("PEFT: scalings and switches of single layers")
@pytest.mark.parametrize("state", STATES)
def test_state_outside_of_a_config(pair: Pair, state: str) -> None:
    models = tuned(pair, lora())
    before = same(models)
    for model in models:
        STATES[state](model)
    assert (same(models) - before).abs().max() > 1e-3
    same_training(models)


def test_scaling_for_a_while(pair: Pair) -> None:
    from peft.helpers import rescale_adapter_scale

    models = tuned(pair, lora())
    before = same(models)
    with rescale_adapter_scale(models[0], 0.5), rescale_adapter_scale(models[1], 0.5):
        assert (same(models) - before).abs().max() > 1e-3
    close(same(models), before)
    with models[0].disable_adapter(), models[1].disable_adapter():
        same(models)


@pytest.mark.works("PEFT: several adapters at once, weighted, hotswapped, deleted")
def test_several_adapters(pair: Pair, tmp_path: Path) -> None:
    models = tuned(pair, lora(task_type="CAUSAL_LM"))
    for model in models:
        torch.manual_seed(6)
        model.add_adapter("other", lora(r=2, target_modules=["q_proj", "up_proj"]))
        model.set_adapter("other")
        noisy(model, "other")
    alone = same(models)
    for model in models:
        model.base_model.set_adapter(["default", "other"])
    assert (same(models) - alone).abs().max() > 1e-3
    same_training(models)
    for model in models:
        names = ["default", "other"]
        model.add_weighted_adapter(names, [0.7, 0.6], "both", combination_type="cat")
        model.set_adapter("both")
    same(models)
    for model in models:
        model.delete_adapter("other")
        model.set_adapter("default")
    same(models)
    noisy(tuned(pair, lora(task_type="CAUSAL_LM"))[1]).save_pretrained(tmp_path)
    for model in models:
        hotswap_adapter(model, tmp_path, "default")
    same(models)
    for model in models:
        model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=True)
        model.set_adapter("loaded")
    same(models)


@pytest.mark.works("PEFT: `low_cpu_mem_usage=True`, from the first adapter on")
def test_an_adapter_without_values_at_first(pair: Pair, tmp_path: Path) -> None:
    noisy(tuned(pair, lora(task_type="CAUSAL_LM"))[1]).save_pretrained(tmp_path)
    models = [
        peft.PeftModel.from_pretrained(copy.deepcopy(one), tmp_path, low_cpu_mem_usage=True)
        for one in (pair.remote, pair.local)
    ]
    assert (same(models) - pair.local(tokens()).logits).abs().max() > 1e-3


@pytest.mark.works("PEFT: adapters of several types at once (`mixed=True`)")
def test_types_mixed(pair: Pair) -> None:
    models = []
    for model in pair.models():
        torch.manual_seed(4)
        mixed = peft.get_peft_model(model, lora(), mixed=True)
        mixed.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]))
        mixed.set_adapter(["default", "other"])
        models.append(noisy(mixed))
    same(models)
    same_training(models)


@pytest.mark.works("PEFT: rows of a batch with adapters of their own (`adapter_names`)")
def test_rows_with_adapters_of_their_own(pair: Pair) -> None:
    models = tuned(pair, lora(task_type="CAUSAL_LM"))
    for model in models:
        torch.manual_seed(6)
        model.add_adapter("other", lora(r=2))
        model.set_adapter("other")
        noisy(model, "other")
        model.set_adapter("default")
    names = ["other", "__base__", "default"]
    logits = same(models, adapter_names=names)
    for row, name in enumerate(names):
        with models[0].disable_adapter() if name == "__base__" else torch.no_grad():
            if name != "__base__":
                models[0].set_adapter(name)
            close(models[0](tokens()).logits[row], logits[row])
    models[0].set_adapter("default")
    same_generation(models, adapter_names=names)
    same_generation(models, adapter_names=names, num_beams=2)


@pytest.mark.refused(
    "PEFT: initialisations that change the base weights (PiSSA, OLoRA)",
    "bring the block home: `swarm.own(block)`",
)
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_changes_the_weights_wants_blocks_at_home(pair: Pair, kind: str) -> None:
    with pytest.raises(Unsupported, match=r"swarm\.own\(0\)"):
        peft.get_peft_model(pair.models()[0], lora(init_lora_weights=kind))


def by_eva(model: Any) -> None:
    """It looks at the inputs of modules."""
    tuned = peft.get_peft_model(model, lora(init_lora_weights="eva"))
    peft.initialize_lora_eva_weights(tuned, [{"input_ids": tokens()}], show_progress_bar=False)


def by_corda(model: Any) -> None:
    """It does, too."""
    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    preprocess_corda(model, config, run_model=lambda: model(tokens()))


def by_lora_ga(model: Any) -> None:
    """It wants gradients of the base weights."""
    config = lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step() -> None:
        model(**padded()).loss.backward()

    preprocess_loraga(model, config, step)


def by_kasa(model: Any) -> None:
    """It cuts the base weights down."""
    peft.get_peft_model(model, lora(kasa_config=KasaConfig()))


@pytest.mark.refused(
    "PEFT: initialisations by data (EVA, CorDA, LoRA-GA), KaSA, X-LoRA, MonteCLoRA",
    "another one, or `swarm.own(slice(None))`",
)
@pytest.mark.parametrize("begin", [by_eva, by_corda, by_lora_ga, by_kasa])
def test_what_looks_inside_wants_blocks_at_home(pair: Pair, begin: Callable[..., None]) -> None:
    with pytest.raises(Unsupported, match=OWN):
        begin(pair.models()[0])


REFUSED: dict[str, Any] = {
    "monteclora": lora(monteclora_config=MontecloraConfig()),
    "a module in a block": lora(modules_to_save=["input_layernorm"]),
    "adaption prompts": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
    "poly": peft.PolyConfig(target_modules=TARGETS),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "lily": peft.LilyConfig(target_modules=TARGETS),
    "replicated": lora(layer_replication=[[0, 3], [1, 5]]),
}


@pytest.mark.refused(
    "PEFT: `modules_to_save` in blocks, `AdaptionPromptConfig`, Poly, Lily, prefix tuning, "
    "`layer_replication`",
    "another adapter type, `tuning.DeepPrompts`, or `swarm.own(slice(None))`",
)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_way_out(pair: Pair, kind: str) -> None:
    model = peft.get_peft_model(pair.models()[0], copy.deepcopy(REFUSED[kind]))
    with pytest.raises(Unsupported, match=rf"{OWN}|DeepPrompts"):
        model(tokens())


@pytest.mark.works("PEFT: `layer_replication` of blocks at home, with `use_cache=False`")
def test_blocks_replicated_at_home(pair: Pair) -> None:
    pair.swarm.own(slice(None))
    try:
        models = tuned(pair, REFUSED["replicated"])
        same(models)
        same_training(models)
        same_generation(models, use_cache=False)
        with pytest.raises(Unsupported, match="use_cache=False"):
            models[0].generate(tokens(), max_new_tokens=2)
    finally:
        pair.swarm.release()


@pytest.mark.refused(
    "PEFT: merging into remote blocks", "bring the blocks home: `swarm.own(slice(None))`"
)
@pytest.mark.parametrize("safe", [True, False])
def test_merging_wants_blocks_at_home(pair: Pair, safe: bool) -> None:
    ours, _ = models = tuned(pair, lora())
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(Unsupported, match=r"of block 0 .*swarm\.own\(0\)"):
            merge(safe_merge=safe)
    same(models)


@pytest.mark.refused("PEFT: aLoRA in generation", "`use_cache=False`, or `swarm.own(slice(None))`")
def test_invocation_tokens(pair: Pair) -> None:
    """Activated LoRA counts from the end, and servers take a cached prompt in pieces."""
    models = tuned(pair, lora(alora_invocation_tokens=[5], task_type="CAUSAL_LM"))
    ids = tokens()
    ids[0, 4] = ids[2, 6] = 5
    with torch.no_grad():
        ours, theirs = (model(ids).logits for model in models)
        close(ours, theirs)
        with pytest.raises(Unsupported, match=OWN):
            models[0].generate(ids, max_new_tokens=2)


def test_used_in_turns_an_adapter_is_sent_once(pair: Pair) -> None:
    """As a trainer does that compares with a frozen one."""
    (ours, _), sent = tuned(pair, lora()), []
    ours.add_adapter("other", lora(r=2))
    connection: Any = pair.swarm.connection
    for _ in range(3):
        for name in ("default", "other"):
            ours.set_adapter(name)
            with torch.no_grad():
                ours(tokens())
        sent.append(dict(connection.directory.uploaded))
    assert sent[0] == sent[1] == sent[2]


def averaged(model: Any, averages: AveragedModel) -> float:
    """Three steps of training, each followed by an update of an average of what is trained."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(3):
        model(**padded()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update_parameters(averaged_of(model))
    return float(sum(one.detach().norm() for one in averages.module.parameters()))


def averaged_of(model: Any) -> nn.ParameterList:
    return nn.ParameterList(one for one in model.parameters() if one.requires_grad)


@pytest.mark.refused(
    "Training: averages of all parameters (`AveragedModel(model)`)",
    "one of the parameters with `requires_grad`, or `swarm.own(slice(None))`",
)
@pytest.mark.parametrize("decay", [None, 0.9])
def test_averages_of_what_is_trained(pair: Pair, decay: float | None) -> None:
    kind = None if decay is None else get_ema_multi_avg_fn(decay)
    models = tuned(pair, lora())
    ours, theirs = (
        averaged(model, AveragedModel(averaged_of(model), multi_avg_fn=kind)) for model in models
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    whole = AveragedModel(models[0], multi_avg_fn=kind)
    with pytest.raises(Unsupported, match=rf"average only parameters with requires_grad.*{OWN}"):
        whole.update_parameters(models[0])


@pytest.mark.works("Training: PEFT's adapters in `DistributedDataParallel`")
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_in_parallel(pair: Pair, kind: str, tmp_path: Path) -> None:
    """A process alone: what is frozen and not here is neither broadcast nor reduced."""
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    models = tuned(pair, lora() if kind == "lora" else prompt)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        same_training([DistributedDataParallel(model) for model in models])
    finally:
        distributed.destroy_process_group()
