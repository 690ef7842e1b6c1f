"""Training: packs conversations into rows of the full context and learns the replies."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from demo_model.model import DemoModel, Shape

Document = tuple[np.ndarray, np.ndarray]  # ids, which of them are replies
BALANCE_WEIGHT = 0.04


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run does. `mix` is each source's share of tokens, `late_mix` that of the last part."""

    steps: int = 2600
    rows: int = 48
    peak_rate: float = 1.5e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    warmup: int = 100
    late_part: float = 0.25
    seed: int = 0
    mix: dict[str, float] = field(
        default_factory=lambda: {
            "chitchat": 0.62,
            "questions": 0.06,
            "prompts": 0.04,
            "chatterbot": 0.08,
            "written": 0.20,
        }
    )
    late_mix: dict[str, float] = field(
        default_factory=lambda: {
            "chitchat": 0.32,
            "questions": 0.08,
            "prompts": 0.02,
            "chatterbot": 0.10,
            "written": 0.48,
        }
    )


class Packer:
    """Endless rows of `n_ctx` tokens, filled with whole conversations drawn by source."""

    def __init__(self, sources: dict[str, list[Document]], n_ctx: int, seed: int) -> None:
        self.sources, self.n_ctx, self.rng = sources, n_ctx, random.Random(seed)
        self.queues: dict[str, list[int]] = {name: [] for name in sources}
        self.used = dict.fromkeys(sources, 0.0)
        self.waiting: list[Document] = []  # drawn, but too long for what was left of the last batch

    def _next(self, mix: dict[str, float]) -> Document:
        name = min(mix, key=lambda source: self.used[source] / mix[source])
        if not self.queues[name]:
            self.queues[name] = self.rng.sample(
                range(len(self.sources[name])), len(self.sources[name])
            )
        document = self.sources[name][self.queues[name].pop()]
        self.used[name] += len(document[0])
        return document

    def batch(self, rows: int, mix: dict[str, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, is_reply and document number, each [rows, n_ctx]; document 0 is padding."""
        ids = np.zeros((rows, self.n_ctx), np.int64)
        reply = np.zeros((rows, self.n_ctx), bool)
        documents = np.zeros((rows, self.n_ctx), np.int32)
        filled, number = np.zeros(rows, int), 0
        too_long: list[Document] = []
        while filled.min() < self.n_ctx - 64 and len(too_long) < rows:
            tokens, is_reply = self.waiting.pop() if self.waiting else self._next(mix)
            row = int(filled.argmin())
            if filled[row] + len(tokens) > self.n_ctx:
                too_long.append((tokens, is_reply))
                continue
            number += 1
            place = slice(filled[row], filled[row] + len(tokens))
            ids[row, place], reply[row, place], documents[row, place] = tokens, is_reply, number
            filled[row] += len(tokens)
        self.waiting = too_long
        return ids, reply, documents

    def restart_shares(self) -> None:
        """Count shares anew, when the mix changes."""
        self.used = dict.fromkeys(self.sources, 0.0)


def reply_loss(
    model: DemoModel, ids: torch.Tensor, reply: torch.Tensor, documents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss in nats of the reply tokens of a batch, and the balance loss."""
    hidden, balance = model(ids, documents)
    wanted = reply[:, 1:]
    logits = model.logits(hidden[:, :-1][wanted])
    return F.cross_entropy(logits.float(), ids[:, 1:][wanted]), balance


def train(
    shape: Shape,
    recipe: Recipe,
    sources: dict[str, list[Document]],
    held_out: list[Document],
    device: str,
) -> DemoModel:
    """A trained model (on the CPU, float32); prints loss as it goes."""
    torch.manual_seed(recipe.seed)
    model = DemoModel(shape, recipe.dropout).to(device)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {recipe}", flush=True
    )
    if device == "cuda":
        for layer in model.layers:
            layer.compile(dynamic=False)
    optimizer = _optimizer(model, recipe, device)
    started = time.monotonic()
    for step, batch in enumerate(
        _batches(Packer(sources, shape.n_ctx, recipe.seed), recipe, device)
    ):
        _set_rate(optimizer, recipe, step)
        with torch.autocast(device, torch.bfloat16):
            loss, balance = reply_loss(model, *batch)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == recipe.steps - 1:
            scored = held_out_loss(model, held_out, device, recipe.rows)
            print(
                f"step {step}: reply loss {loss.item():.3f}, held out {scored:.3f},"
                f" balance {balance.item():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model.float().cpu().eval()


def _optimizer(model: DemoModel, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=device == "cuda")


def _set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    warm = min(1.0, (step + 1) / recipe.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))
    for group in optimizer.param_groups:
        group["lr"] = recipe.peak_rate * warm * (0.02 + 0.98 * fall)


def _batches(packer: Packer, recipe: Recipe, device: str) -> Iterator[tuple[torch.Tensor, ...]]:
    late_from = int(recipe.steps * (1 - recipe.late_part))
    for step in range(recipe.steps):
        if step == late_from:
            packer.restart_shares()
        arrays = packer.batch(recipe.rows, recipe.late_mix if step >= late_from else recipe.mix)
        yield tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)


@torch.no_grad()
def held_out_loss(model: DemoModel, held_out: list[Document], device: str, rows: int) -> float:
    """Loss in nats of each reply token of `held_out`, without dropout."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for arrays in packed_once(held_out, model.shape.n_ctx, rows):
        batch = tuple(torch.from_numpy(array).to(device) for array in arrays)
        with torch.autocast(device, torch.bfloat16):
            loss, _ = reply_loss(model, *batch)
        n_tokens = int(arrays[1][:, 1:].sum())
        total, count = total + loss.item() * n_tokens, count + n_tokens
    model.train(was_training)
    return total / count


def packed_once(
    documents: list[Document], n_ctx: int, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every document once, longest first, in batches of `rows` rows."""
    places: list[tuple[int, int]] = []
    filled: list[int] = []
    ordered = sorted(documents, key=lambda document: -len(document[0]))
    for ids, _ in ordered:
        row = next((r for r, used in enumerate(filled) if used + len(ids) <= n_ctx), len(filled))
        filled += [0] if row == len(filled) else []
        places.append((row, filled[row]))
        filled[row] += len(ids)
    shape = (-(-len(filled) // rows) * rows, n_ctx)
    arrays = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, np.int32)
    for number, ((row, start), (ids, is_reply)) in enumerate(
        zip(places, ordered, strict=True), start=1
    ):
        for array, values in zip(arrays, (ids, is_reply, number), strict=True):
            array[row, start : start + len(ids)] = values
    for first in range(0, shape[0], rows):
        yield tuple(array[first : first + rows] for array in arrays)
