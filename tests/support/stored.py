"""Matrices as files of GGUF, GPTQ or AWQ have them, of random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape

from swarm_notebook.checkpoint.gguf_packed import PackedGguf
from swarm_notebook.checkpoint.packed import Packed
from swarm_notebook.checkpoint.words_packed import packed_words

# A type of GGUF, and where in a group of its bytes the scales are (float16).
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def stored(kind: str, rows: int, columns: int, seed: int, device: str = "cpu") -> Packed:
    """A matrix of random bytes; its values are small."""
    generator = np.random.default_rng(seed)
    if kind.startswith("words"):
        bits, groups = int(kind[6]), columns // 64
        integers = torch.from_numpy(generator.integers(0, 2**bits, (rows, columns)))
        zeros = torch.from_numpy(generator.integers(0, 2**bits, (rows, groups)))
        scales = torch.full((rows, groups), 0.1 / 2**bits, dtype=torch.float16)
        index = torch.arange(columns) // 64
        if "order" in kind:
            index = index[torch.from_numpy(generator.permutation(columns))]
        packed: Packed = packed_words(bits, integers, zeros, scales, index)
    else:
        known = gguf.GGMLQuantizationType[kind]
        shape = quant_shape_to_byte_shape((rows, columns), known)
        raw = generator.integers(0, 256, shape, dtype=np.uint8)
        _, size = gguf.GGML_QUANT_SIZES[known]
        groups = raw.reshape(-1, size)
        for place in SCALES[kind]:
            groups[:, place : place + 2] = np.array([1e-4], "<f2").view(np.uint8)
        packed = PackedGguf(known, torch.Size([rows, columns]), torch.from_numpy(raw))
    return packed.around([part.to(device) for part in packed.parts()])
