"""A 5-gram model with modified Kneser-Ney smoothing: what the demo model has to beat.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998),
section 3. It learns the replies of chitchat-dataset, each once, and predicts the same tokens as the
demo model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Document = tuple[np.ndarray, np.ndarray]  # ids, which of them are replies
ORDER = 5
BITS = 12  # a token of 4,096; five of them fit an int64


@dataclass(frozen=True, slots=True)
class _Order:
    """Counts of each gram (context and word in one key), and what each context gives away."""

    grams: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    given_away: np.ndarray


def reply_grams(documents: list[Document]) -> np.ndarray:
    """The 5 tokens that end at each reply token, as one key; every reply has 4 tokens before it."""
    keys = []
    for ids, is_reply in documents:
        wide = ids.astype(np.int64)
        ends = np.flatnonzero(is_reply)
        key = np.zeros(len(ends), np.int64)
        for back in range(ORDER - 1, -1, -1):
            key = (key << BITS) | wide[ends - back]
        keys.append(key)
    return np.concatenate(keys)


def mean_loss(training: list[Document], held_out: list[Document]) -> float:
    """Mean loss in nats of each reply token of `held_out`."""
    orders = _count(reply_grams(training))
    keys = reply_grams(held_out)
    probability = np.full(len(keys), 1 / (1 << BITS))
    for n, order in enumerate(orders, start=1):
        grams = keys & ((1 << (BITS * n)) - 1)
        probability = _interpolate(order, grams, probability)
    return float(-np.log(probability).mean())


def _count(keys: np.ndarray) -> list[_Order]:
    """Orders 1 to 5; below the highest a gram counts the different tokens seen before it."""
    grams, counts = np.unique(keys, return_counts=True)
    orders = [_discount(grams, counts)]
    for n in range(ORDER - 1, 0, -1):
        grams, counts = np.unique(grams & ((1 << (BITS * n)) - 1), return_counts=True)
        orders.append(_discount(grams, counts))
    return orders[::-1]


def _discount(grams: np.ndarray, counts: np.ndarray) -> _Order:
    ones, twos, threes, fours = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    base = ones / (ones + 2 * twos)
    steps = np.array(
        [
            0.0,
            1 - 2 * base * twos / ones,
            2 - 3 * base * threes / twos,
            3 - 4 * base * fours / threes,
        ]
    )
    discounts = np.clip(steps, 0.0, None)[np.minimum(counts, 3)]
    contexts, where = np.unique(grams >> BITS, return_inverse=True)
    totals = np.bincount(where, counts)
    return _Order(
        grams, counts - discounts, contexts, totals, np.bincount(where, discounts) / totals
    )


def _interpolate(order: _Order, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
    context, known = _find(order.contexts, grams >> BITS)
    gram, seen = _find(order.grams, grams)
    share = np.where(seen, order.discounted[gram], 0.0) / order.totals[context]
    return np.where(known, share + order.given_away[context] * lower, lower)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each key in a sorted table, and whether it is there."""
    places = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return places, table[places] == keys
