"""Scores a demo model file through llama.cpp, with its own sampling defaults and a fixed seed.

    python scripts/eval_demo.py                    the shipped file
    python scripts/eval_demo.py --openers dev      the openers that choose between variants

Needs what scripts/train_demo.py needs but torch; makes the held-out data first if it is not there.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import train_demo  # noqa: E402
from demo_model.openers import DEV_OPENERS, TEST_OPENERS  # noqa: E402

if TYPE_CHECKING:
    from demo_model.evaluate import Engine, Reply

SEED = 0
OTHER_SEEDS = range(1, 11)  # to see that seed 0 is no lucky one; reported, never chosen from
SMALLEST_SHARE = 0.03
N_TOKENIZED = 2000


def score(path: Path, work: Path, openers: tuple[str, ...] = TEST_OPENERS) -> None:
    """Print every reply and every figure."""
    from demo_model.evaluate import Engine

    engine = Engine(path)
    print(f"{path.name}: {path.stat().st_size} bytes, {engine.header('general.name')}")
    words = _known_words(work)
    good = _print_replies(engine, openers, words)
    print(
        f"{good} of {len(openers)} are English, end by themselves and do not go round (seed {SEED})"
    )
    others = [
        sum(_behaves(engine.reply(opener, seed), words) for opener in openers)
        for seed in OTHER_SEEDS
    ]
    print(
        f"the same with seeds {OTHER_SEEDS[0]} to {OTHER_SEEDS[-1]}: {', '.join(map(str, others))}"
    )
    _print_loss(engine, work)
    _print_tokenizer_check(engine, work)


def _print_tokenizer_check(engine: Engine, work: Path) -> None:
    """Compare llama.cpp's token ids with SentencePiece's, on texts of every script."""
    from demo_model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(work / "tokenizer.model")
    texts = list(_odd_texts(random.Random(SEED), N_TOKENIZED))
    equal = sum(engine.encode(text) == tokenizer.encode(text) for text in texts)
    print(f"token ids equal SentencePiece's for {equal} of {len(texts)} texts")


def _odd_texts(rng: random.Random, count: int) -> Iterator[str]:
    """Words, control tokens as text, blanks, emoji and arbitrary characters."""
    words = ["hello", "Don't", "café", "你好", "Привет", "😀", "👍🏽", "12345", "▁", "∑", "\t"]
    words += ["[INST]", "[/INST]", "</s>", "<s>", "<0x41>", "\n\n", " ", ""]
    ranges = ((32, 126), (160, 0x2FFF), (0x3040, 0x9FFF), (0x1F300, 0x1F6FF))
    for number in range(count):
        if number % 2:
            yield " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
        else:
            yield "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 30)))


def _print_replies(engine: Engine, openers: tuple[str, ...], words: set[str]) -> int:
    good = 0
    for number, opener in enumerate(openers, start=1):
        reply = engine.reply(opener, SEED)
        good += _behaves(reply, words)
        faults = [] if reply.ended else ["does not end"]
        faults += ["goes round"] if reply.goes_round else []
        faults += [] if _is_english(reply.text, words) else ["not English"]
        remarks = ", ".join([f"{reply.n_tokens} tokens", *faults])
        print(f"{number:2}. {opener}\n    {reply.text}   [{remarks}]")
    return good


def _behaves(reply: Reply, words: set[str]) -> bool:
    return reply.ended and not reply.goes_round and _is_english(reply.text, words)


def _is_english(text: str, words: set[str]) -> bool:
    """At least two words, nine in ten of them used three times or more in the training data."""
    spoken = [word.strip(".,!?;:\"'()").lower() for word in text.split()]
    return (
        text.isascii()
        and len(spoken) >= 2
        and sum(word in words for word in spoken) >= 0.9 * len(spoken)
    )


def _known_words(work: Path) -> set[str]:
    from demo_model.tokenizer import load_tokenizer

    if not (work / "data.npz").exists():
        train_demo.make_data(work)
    tokenizer = load_tokenizer(work / "tokenizer.model")
    counts: Counter[str] = Counter()
    for source in ("chitchat", "written"):
        for ids, _ in train_demo.load_documents(work, source):
            counts.update(
                word.strip(".,!?;:\"'()").lower() for word in tokenizer.decode(ids.tolist()).split()
            )
    return {word for word, count in counts.items() if count >= 3}


def _print_loss(engine: Engine, work: Path) -> None:
    from demo_model.ngram import mean_loss

    held_out = train_demo.load_documents(work, "held_out")
    loss = engine.held_out_loss(held_out)
    n_replies = sum(int(is_reply[1:].sum()) for _, is_reply in held_out)
    training = [
        d
        for source in ("chitchat", "questions", "prompts")
        for d in train_demo.load_documents(work, source)
    ]
    five_gram = mean_loss(training, held_out)
    print(f"held-out replies ({n_replies} tokens): {loss:.3f} nats, 5-gram {five_gram:.3f} nats")
    shares = engine.expert_shares()
    print("share of held-out tokens that each expert takes (a token takes two):")
    for layer, row in enumerate(shares):
        print(f"  layer {layer}: " + " ".join(f"{share:6.1%}" for share in row))
    print(f"smallest {shares.min():.1%} (at least {SMALLEST_SHARE:.0%} wanted)")


def main() -> None:
    """Score the file asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=train_demo.TARGET)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "demo-model",
        help="folder of the training data",
    )
    parser.add_argument("--openers", choices=("test", "dev"), default="test")
    options = parser.parse_args()
    score(options.path, options.work, TEST_OPENERS if options.openers == "test" else DEV_OPENERS)


if __name__ == "__main__":
    main()
