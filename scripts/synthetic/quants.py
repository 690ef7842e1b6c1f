"""Which type a tensor gets in a quant: llama-quantize's rules for the mixes people download.

From llama_tensor_get_type_impl (src/llama-quant.cpp), without an importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gguf_writer import TYPES

# enum llama_ftype (llama.h): what general.file_type says
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 11, "Q3_K_M": 12,
    "Q4_K": 14, "Q4_K_M": 15, "Q5_K": 16, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32, "MXFP4": 38,
}  # fmt: skip
# a mix: what most tensors get
MIXES = {"Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
QUANTS = tuple(q for q in FILE_TYPES if q in TYPES or q in MIXES)


@dataclass(frozen=True, slots=True)
class Quant:
    """`type_of` answers for one model: rules look at the number of layers and experts."""

    name: str
    n_layers: int
    n_experts: int

    def type_of(self, part: str, layer: int = 0) -> str:
        """`part` is the tensor's name without block and suffix, as attn_v or ffn_down_exps."""
        if self.name not in MIXES:
            return self.name
        base = MIXES[self.name]
        more = self.name != "Q3_K_M" and self._more_bits(layer)
        if part == "output":
            return "Q6_K"
        if part in ("attn_k", "attn_v") and self.n_experts == 8:
            return "Q8_0"
        if part == "attn_v":
            return ("Q5_K" if layer < 2 else "Q4_K") if base == "Q3_K" else "Q6_K" if more else base
        if part == "attn_output":
            return self._attn_output(base)
        if part.startswith("ffn_down"):
            return self._ffn_down(base, layer, more)
        return base

    def _attn_output(self, base: str) -> str:
        if self.n_experts == 8 and base in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return "Q4_K" if base == "Q3_K" else base

    def _ffn_down(self, base: str, layer: int, more: bool) -> str:
        if base == "Q3_K":
            return "Q5_K" if layer < self.n_layers // 16 else "Q4_K"
        return "Q6_K" if more else base

    def _more_bits(self, layer: int) -> bool:
        eighth = self.n_layers // 8
        return layer < eighth or layer >= 7 * self.n_layers // 8 or (layer - eighth) % 3 == 2
