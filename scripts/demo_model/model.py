"""Mixtral's architecture in PyTorch, as llama.cpp computes it (src/models/llama.cpp).

RMSNorm, grouped-query attention with interleaved rotary pairs, and experts chosen two of eight by a
softmax router whose two weights are made to sum to one. Embedding and output share one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; `n_embd` and `n_ff` are multiples of 256, the block of K quants."""

    n_vocab: int = 4096
    n_ctx: int = 1024
    n_embd: int = 256
    n_layer: int = 8
    n_head: int = 8
    n_head_kv: int = 4
    n_expert: int = 8
    n_expert_used: int = 2
    n_ff: int = 256


class Attention(nn.Module):
    """Causal attention within one conversation of a packed row."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.head_dim = shape, shape.n_embd // shape.n_head
        self.q = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.k = nn.Linear(shape.n_embd, shape.n_head_kv * self.head_dim, bias=False)
        self.v = nn.Linear(shape.n_embd, shape.n_head_kv * self.head_dim, bias=False)
        self.o = nn.Linear(shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, n_embd]; rotation [tokens, pairs, 2]; mask [batch, 1, to, from]."""
        n_batch, n_tokens, _ = x.shape
        q, k, v = (
            w(x).view(n_batch, n_tokens, -1, self.head_dim).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        repeats = self.shape.n_head // self.shape.n_head_kv
        k = _rotate(k, rotation).repeat_interleave(repeats, dim=1)
        v = v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(_rotate(q, rotation), k, v, attn_mask=mask)
        return self.o(out.transpose(1, 2).reshape(n_batch, n_tokens, -1))


class Experts(nn.Module):
    """All experts as one wide layer, masked: at this size faster than sorting tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide = shape.n_expert * shape.n_ff
        self.router = nn.Linear(shape.n_embd, shape.n_expert, bias=False)
        self.gate = nn.Linear(shape.n_embd, wide, bias=False)
        self.up = nn.Linear(shape.n_embd, wide, bias=False)
        self.down = nn.Linear(wide, shape.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and a loss that is least (1) when experts are used alike (Switch, eq. 4)."""
        probabilities = F.softmax(self.router(x).float(), dim=-1)
        top, chosen = probabilities.topk(self.shape.n_expert_used, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(
            -1, chosen, top / top.sum(-1, keepdim=True)
        )
        share = (weights > 0).float().mean((0, 1)) / self.shape.n_expert_used
        balance = self.shape.n_expert * (share * probabilities.mean((0, 1))).sum()
        hidden = F.silu(self.gate(x)) * self.up(x)
        hidden = hidden.unflatten(-1, (self.shape.n_expert, self.shape.n_ff))
        return self.down((hidden * weights.to(hidden.dtype).unsqueeze(-1)).flatten(-2)), balance


class Layer(nn.Module):
    """Attention and experts, each behind a norm and added to the stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.n_embd, eps=NORM_EPSILON)
        self.attention = Attention(shape)
        self.experts_norm = nn.RMSNorm(shape.n_embd, eps=NORM_EPSILON)
        self.experts = Experts(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, rotation: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream after this layer, and the router's balance loss."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, mask))
        change, balance = self.experts(self.experts_norm(x))
        return x + self.dropout(change), balance


class DemoModel(nn.Module):
    """The whole model: ids and document numbers in, hidden states and balance loss out."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.n_layer))
        self.norm = nn.RMSNorm(shape.n_embd, eps=NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("rotation", rotation_table(shape), persistent=False)
        self.apply(_initialise)
        for layer in self.layers:
            for writes in (layer.attention.o, layer.experts.down):
                nn.init.normal_(writes.weight, std=0.02 / (2 * shape.n_layer) ** 0.5)

    def forward(
        self, ids: torch.Tensor, documents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [batch, tokens, n_embd], balance loss; `documents` parts conversations."""
        n_tokens = ids.shape[1]
        causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=ids.device).tril()
        mask = (causal & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
        x = self.dropout(self.embedding(ids))
        total = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x, balance = layer(x, self.rotation[:n_tokens], mask)
            total = total + balance
        return self.norm(x), total / len(self.layers)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token."""
        return F.linear(hidden, self.embedding.weight)


def rotation_table(shape: Shape) -> torch.Tensor:
    """Cosine and sine of every position and pair: [n_ctx, head_dim/2, 2]."""
    head_dim = shape.n_embd // shape.n_head
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(shape.n_ctx), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.to(x.dtype).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
