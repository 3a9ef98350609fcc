"""Where a model comes from: a folder, a GGUF file, a Hub repository, or the demo model.

`resolve` turns what the user wrote into a `ModelSource` and fails at once, saying what it tried,
when there is nothing to load. A source is cheap to hold: config and tokenizer are read when asked
for, weights tensor by tensor (`weights`), and of a Hub repository only the files that hold them.

Weights are read from safetensors or GGUF. Pickles (``pytorch_model.bin``) can run code while they
are read, so they are refused.

`dht_prefix` is the name under which the blocks of this model are announced. It follows Petals'
rules, so that both find each other; it holds neither ``.`` nor a space, which separate the parts
of a UID.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files import demo, hub, weights, words
from swarm_notebook.checkpoint.files.dummy import PREFIX as DUMMY_PREFIX
from swarm_notebook.checkpoint.files.dummy import DummyWeights
from swarm_notebook.checkpoint.files.gguf import MAGIC, GgufFile, GgufWeights
from swarm_notebook.checkpoint.files.quantised import method_of, settings_of, without_quantizer
from swarm_notebook.checkpoint.files.weights import INDEX_FILE, SINGLE_FILE, Weights
from swarm_notebook.errors import ModelNotFound, Unsupported

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

# Beyond these a model would not be built in memory or in time. The deepest model that is published
# has 126 blocks, the widest is 18,432 wide, the largest vocabulary has 262,208 words.
MOST = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
}


@dataclass(frozen=True)
class ModelSource:
    """A model that exists, and how to read its parts.

    Attributes:
        name: what names this source in messages and on a command line.
        path: the local folder or GGUF file; None for a Hub repository.
        dht_prefix: the model's name in the swarm's DHT.
        repository: address on the Hub, or None.
        dummy: it has a config, and random weights of its shape (`dummy`).
    """

    name: str
    path: Path | None
    dht_prefix: str
    repository: str | None = None
    dummy: bool = False

    @property
    def is_gguf(self) -> bool:
        return self.path is not None and self.path.is_file()

    @property
    def shared_name(self) -> str:
        """What names it on other machines, too; empty for a folder or file of this one."""
        if self.repository is not None:
            return self.name
        return demo.DEMO_NAME if self.path is not None and demo.is_demo(self.path) else ""

    @cached_property
    def _location(self) -> tuple[str, dict[str, Any]]:
        """The arguments with which transformers' ``from_pretrained`` finds this model's files."""
        if self.path is None:
            return self.name, {"local_files_only": not hub.reachable()}
        if self.is_gguf:
            return str(self.path.parent), {"gguf_file": self.path.name}
        return str(self.path), {}

    @cached_property
    def _config(self) -> PreTrainedConfig:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        where, options = self._location
        if self.is_gguf and self.path is not None:
            GgufFile(self.path)  # a header that lies is found before others trust its counts
        try:
            config = AutoConfig.from_pretrained(where, **options)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise ModelNotFound(f"model {self.name!r}: config not readable: {error}") from error
        quantised = getattr(config, "quantization_config", None)
        config = config.get_text_config(decoder=True)
        if quantised is not None:
            config.quantization_config = quantised
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise Unsupported(
                f"model {self.name!r} is a {config.model_type!r}: only causal language models can "
                "be served by blocks"
            )
        if absurd := [name for name, most in MOST.items() if not _below(config, name, most)]:
            raise ModelNotFound(
                f"model {self.name!r}: its config has {absurd[0]} = "
                f"{getattr(config, absurd[0])!r}, which no model has; download it again"
            )
        return config

    @cached_property
    def quantised_by(self) -> str | None:
        """What the published weights were quantised by, as transformers calls it.

        Raises:
            Unsupported: nobody here knows it.
        """
        return method_of(self._config)

    def config(self) -> PreTrainedConfig:
        """A fresh copy of the causal language model's own (text) config, as it is loaded."""
        config = copy.deepcopy(self._config)
        if self.quantised_by in words.METHODS:
            without_quantizer(config)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        from transformers import AutoTokenizer

        if not (self.is_gguf or any(self._has(name) for name in TOKENIZER_FILES)):
            return None
        where, options = self._location
        return AutoTokenizer.from_pretrained(where, **options)

    def generation_config(self) -> GenerationConfig | None:
        from transformers import GenerationConfig

        if self.is_gguf or not self._has("generation_config.json"):
            return None
        where, options = self._location
        return GenerationConfig.from_pretrained(where, **options)

    def _has(self, filename: str) -> bool:
        if self.path is None:
            return hub.has(self.name, filename)
        return (self.path / filename).is_file()

    def weights(self) -> Weights:
        """The checkpoint's tensors by name, none of them read yet."""
        if self.dummy:
            return DummyWeights(self.config())
        if self.path is None:
            return self._unpacked(weights.from_repository(self.name))
        if self.is_gguf:
            return GgufWeights(self.path, self.config())
        return self._unpacked(weights.from_folder(self.path))

    def _unpacked(self, stored: Weights) -> Weights:
        if self.quantised_by in words.METHODS:
            return words.WordWeights(stored, settings_of(self._config))
        return stored


def _below(config: PreTrainedConfig, name: str, most: int) -> bool:
    """Whether a number of a config is possible; it need not be there, and may be a list."""
    told = getattr(config, name, None)
    return not isinstance(told, (int, float)) or 0 <= told <= most


def resolve(
    model: str | os.PathLike[str] | None,
    *,
    progress: Callable[[int, int], None] | None = None,
    dummy: bool = False,
) -> ModelSource:
    """Find `model`: a folder, a ``.gguf`` file, or a Hub id; None is the demo model.

    :param progress: called with (bytes done, bytes in all) while the demo model is converted,
        which happens once and takes some seconds.
    :param dummy: with random weights in the place of its own, which need not be there.

    Raises:
        ModelNotFound: with what was looked for, what was found, and what to do.
        TypeError: it is nothing of these, but a model or a swarm, say.
    """
    if dummy:
        return _dummy(model)
    if model is None or model == demo.DEMO_NAME:
        return _demo(progress)
    try:
        text = os.fspath(model)
    except TypeError:
        raise TypeError(
            f"model: a {type(model).__name__}, expected its folder, its .gguf file, or its Hub id"
        ) from None
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if hub.is_repository_name(text):
        return _repository(text)
    raise ModelNotFound(
        f"model {text!r}: no such folder or file, and not the form of a Hub id (organisation/name)"
    )


def _demo(progress: Callable[[int, int], None] | None) -> ModelSource:
    try:
        return _repository(demo.DEMO_REPOSITORY)
    except ModelNotFound:
        return _folder(demo.demo_model(progress))


def _dummy(model: str | os.PathLike[str] | None) -> ModelSource:
    """The shape of a model whose folder, or name on the Hub, is given."""
    text = os.fspath(model or demo.DEMO_REPOSITORY)
    path = Path(text).expanduser().resolve()
    if (path / "config.json").is_file():
        name, folder = path.name, path
    elif hub.is_repository_name(text) and hub.fetch(text, "config.json") is not None:
        name, folder = text.rpartition("/")[2], None
    else:
        raise ModelNotFound(
            f"model {text!r}: dummy weights need a folder with a config.json, or a Hub id"
        )
    prefix = _clean(name)
    if not prefix.startswith(DUMMY_PREFIX):
        prefix = f"{DUMMY_PREFIX}{prefix}"
    return ModelSource(str(folder or text), folder, prefix, dummy=True)


def _folder(path: Path) -> ModelSource:
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise ModelNotFound(
            f"model folder {path} has no config.json; give the folder that holds config and weights"
        )
    if not any((path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)):
        pickles = [name for name in PICKLE_FILES if (path / name).is_file()]
        raise ModelNotFound(_no_weights(f"model folder {path}", pickles))
    return ModelSource(name=str(path), path=path, dht_prefix=_clean(path.name))


def _no_weights(where: str, pickles: list[str]) -> str:
    if pickles:
        return (
            f"{where} has its weights only as {pickles[0]}, a pickle, which can run code and is "
            "never read; convert it to safetensors: load it once with transformers where you "
            "trust it, and call save_pretrained(folder)"
        )
    return (
        f"{where} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; download the whole "
        "model, or give another folder"
    )


def _file(path: Path) -> ModelSource:
    path = path.resolve()
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ModelNotFound(
            f"model file {path} is not a GGUF file (it begins with {magic!r}); give a folder with "
            "config.json and safetensors, a .gguf file, or a Hub id"
        )
    return ModelSource(name=str(path), path=path, dht_prefix=_clean(path.stem))


def _repository(name: str) -> ModelSource:
    if hub.fetch(name, "config.json") is None:
        raise ModelNotFound(_no_config(name))
    if hub.fetch(name, INDEX_FILE) is None and not hub.has(name, SINGLE_FILE):
        pickles = [file for file in PICKLE_FILES if hub.has(name, file)]
        raise ModelNotFound(_no_weights(f"Hub repository {name}", pickles))
    address = hub.url(name)
    family = ModelSource(name, None, dht_prefix="", repository=address).config().model_type
    return ModelSource(name, None, _repository_prefix(name, family), address)


def _no_config(name: str) -> str:
    if hub.reachable():
        return f"model {name!r}: no such folder or file here; the Hub repository has no config.json"
    return (
        f"model {name!r}: no such folder or file here, the Hub does not answer, and its cache on "
        "this machine does not hold this model; give a local folder, or connect to the internet"
    )


def _repository_prefix(name: str, family: str) -> str:
    """Petals' names: what it takes of the Hub id, and what it appends, depends on the family."""
    base = name.rpartition("/")[2]
    if family == "llama":
        return _clean(base) if base.endswith("-hf") else f"{_clean(base)}-hf"
    if family == "bloom":
        return f"{_clean(name)}-petals"
    return _clean(name if family == "mixtral" else base)


def _clean(name: str) -> str:
    return name.replace(".", "-").replace(" ", "-")
