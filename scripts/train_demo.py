"""Makes the demo model from nothing: data, vocabulary, training, quantized file, score.

    python scripts/train_demo.py            everything; localmoe/models/demo/demo.gguf at the end
    python scripts/train_demo.py data       only the data and the vocabulary; then train, export

Needs torch, numpy, sentencepiece, gguf, pyyaml and llama-cpp-python in the running Python. The two
data packages are installed into the work folder by pip. On a GPU training takes minutes, on a CPU
more than a day.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from demo_model.data import SOURCES, build_corpus, install_packages  # noqa: E402

SEED = 0  # of data and training; fixed before the first run, never tuned
TARGET = ROOT / "localmoe" / "models" / "demo" / "demo.gguf"
MAX_BYTES = 10 * 1024 * 1024
# Types by tensor pattern, the rest is Q4_K; together they use up the 10 MiB. The dense matrices are
# Q5_1, which llama.cpp's AMX code leaves alone: built by GCC 12 it crashes on K quants
# (docs/notes/demo-model.md).
QUANT_KINDS = {"token_embd": "Q5_1", "attn_": "Q5_1", "ffn_down_exps": "Q6_K"}


def make_data(work: Path) -> None:
    """Conversations as token ids, in work/data.npz, and the vocabulary they are written in."""
    from demo_model.tokenizer import encode_all, load_tokenizer, train_tokenizer, user_text

    install_packages(work / "packages")
    corpus = build_corpus(work / "packages", SEED)
    views = (
        corpus.training["chitchat"][::2]
        + corpus.training["chatterbot"]
        + corpus.training["written"][::4]
    )
    texts = (
        user_text(turn) if i % 2 == 0 else turn for view in views for i, turn in enumerate(view)
    )
    train_tokenizer(texts, work / "tokenizer.model")
    tokenizer = load_tokenizer(work / "tokenizer.model")
    arrays = {}
    for source, conversations in {**corpus.training, "held_out": corpus.held_out}.items():
        documents = encode_all(tokenizer, conversations, n_ctx=1024)
        arrays[f"{source}_ids"] = np.concatenate([ids for ids, _ in documents])
        arrays[f"{source}_reply"] = np.packbits(
            np.concatenate([is_reply for _, is_reply in documents])
        )
        arrays[f"{source}_lengths"] = np.array([len(ids) for ids, _ in documents], np.uint16)
        print(
            f"{source}: {len(documents)} conversations, {len(arrays[f'{source}_ids'])} tokens",
            flush=True,
        )
    np.savez_compressed(work / "data.npz", **arrays)


def load_documents(work: Path, source: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """One source's conversations as (ids, is_reply), as `make_data` wrote them."""
    with np.load(work / "data.npz") as arrays:
        ids, lengths = arrays[f"{source}_ids"], arrays[f"{source}_lengths"].astype(int)
        is_reply = np.unpackbits(arrays[f"{source}_reply"], count=len(ids)).astype(bool)
    ends = np.cumsum(lengths)[:-1]
    return list(zip(np.split(ids, ends), np.split(is_reply, ends), strict=True))


def train_model(work: Path, steps: int | None) -> None:
    """Train on a GPU if there is one, and write work/demo-f16.gguf."""
    import torch
    from demo_model.export import write_gguf
    from demo_model.model import Shape
    from demo_model.tokenizer import load_tokenizer
    from demo_model.train import Recipe, train

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print(
            "No GPU: training would take more than a day. --steps 20 rehearses it.", file=sys.stderr
        )
    recipe = replace(Recipe(seed=SEED), **({"steps": steps} if steps else {}))
    sources = {source: load_documents(work, source) for source in SOURCES}
    model = train(Shape(), recipe, sources, load_documents(work, "held_out"), device)
    write_gguf(model, load_tokenizer(work / "tokenizer.model"), work / "demo-f16.gguf")


def export_model(work: Path, target: Path) -> None:
    """Quantize work/demo-f16.gguf into the shipped file; RuntimeError if it is over 10 MiB."""
    from demo_model.export import quantize

    part = (
        work / "demo.gguf.part"
    )  # a file that may be mapped by a running model is never written in place
    quantize(work / "demo-f16.gguf", part, QUANT_KINDS)
    n_bytes = part.stat().st_size
    if n_bytes > MAX_BYTES:
        raise RuntimeError(f"{part} has {n_bytes} bytes; at most {MAX_BYTES} may ship")
    shutil.copyfile(part, target.with_suffix(".part"))
    target.with_suffix(".part").replace(target)
    print(f"{target}: {n_bytes} bytes")


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stage", nargs="?", default="all", choices=("all", "data", "train", "export", "score")
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "demo-model",
        help="folder for what is in between",
    )
    parser.add_argument("--target", type=Path, default=TARGET, help="the file to make")
    parser.add_argument("--steps", type=int, help="fewer training steps, for a rehearsal")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage in ("all", "data"):
        make_data(options.work)
    if options.stage in ("all", "train"):
        train_model(options.work, options.steps)
    if options.stage in ("all", "export"):
        export_model(options.work, options.target)
    if options.stage in ("all", "score"):
        from eval_demo import score

        score(options.target, options.work)


if __name__ == "__main__":
    main()
