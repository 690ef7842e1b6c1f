"""Makes a model file of random weights in any Mixture-of-Experts shape.

    python scripts/make_model.py --preset mixtral-1gb --quant Q4_K mixtral-1gb.gguf
    python scripts/make_model.py --preset mixtral-8x7b --quant Q4_K_M --header-only plan.gguf

In the Mixtral presets the vocabulary is the real one and the router uses all experts evenly, so
speed and memory are those of the real model; what it says is nonsense. The other presets have the
sizes of published models of their family and a made-up vocabulary. `--header-only` gives a sparse
file of the right length, for everything that reads no weights.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from synthetic import families, gguf_writer, mixtral
from synthetic.families import FAMILIES, Family
from synthetic.mixtral import SHAPES, MixtralShape
from synthetic.quants import QUANTS
from synthetic.weights import RandomWeights

SIZE_OPTIONS = {
    "layers": "n_layers", "width": "n_embd", "heads": "n_heads", "kv-heads": "n_kv_heads",
    "ff": "n_ff", "experts": "n_experts", "used": "n_experts_used", "vocab": "n_vocab",
    "context": "context_length",
}  # fmt: skip


def make_model(
    path: Path,
    shape: MixtralShape | Family,
    quant: str = "Q4_K",
    *,
    header_only: bool = False,
    split_experts: bool = False,
    shards: int = 1,
    seed: int = 0,
    version: int = 3,
) -> list[Path]:
    """Write the model and give its files (more than one with shards).

    `header_only` writes a sparse file; `split_experts` is the Mixtral layout of before April 2024.
    """
    if isinstance(shape, Family):
        plan = families.blueprint(shape, quant)
    else:
        plan = mixtral.blueprint(shape, quant, split_experts)
    weights = None if header_only else RandomWeights(shape.n_embd, seed)
    return gguf_writer.write(path, plan, weights, shards, version)


def main() -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args()
    shape = _shape(parser, options)
    started = time.perf_counter()
    paths = make_model(
        options.path, shape, options.quant, header_only=options.header_only,
        split_experts=options.split_experts, shards=options.shards, seed=options.seed,
        version=options.gguf_version,
    )  # fmt: skip
    n_bytes = sum(path.stat().st_size for path in paths)
    seconds = time.perf_counter() - started
    print(f"{', '.join(map(str, paths))}: {n_bytes:,} bytes in {seconds:.1f} s")
    if options.check_routing:
        _check_routing(paths[0], shape.n_experts_used)


def _shape(parser: argparse.ArgumentParser, options: argparse.Namespace) -> MixtralShape | Family:
    given = {name: getattr(options, name) for name in SIZE_OPTIONS.values()}
    sizes = {name: size for name, size in given.items() if size is not None}
    if options.preset in SHAPES:
        return replace(SHAPES[options.preset], **sizes)
    if sizes.keys() - {"n_layers"} or options.split_experts:
        parser.error(f"of {options.preset} only --layers can be changed")
    family = FAMILIES[options.preset]
    return families.with_layers(family, sizes.get("n_layers", family.n_layers))


def _check_routing(path: Path, n_used: int) -> None:
    from synthetic.routing import evenness, expert_logits

    logits = expert_logits(path)
    fewest, largest = evenness(logits, n_used)
    print(f"every layer of {len(logits)} uses {fewest} experts or more;")
    print(f"no set of {n_used} takes more than {largest:.0%} of the tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--preset", choices=[*SHAPES, *FAMILIES], default="tiny")
    parser.add_argument("--quant", choices=QUANTS, default="Q4_K")
    for option, field in SIZE_OPTIONS.items():
        parser.add_argument(f"--{option}", dest=field, type=int, metavar="N")
    parser.add_argument("--header-only", action="store_true", help="sparse, no weights")
    parser.add_argument("--split-experts", action="store_true", help="the layout of early 2024")
    parser.add_argument("--shards", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf-version", type=int, choices=(2, 3), default=3)
    parser.add_argument("--check-routing", action="store_true", help="run it through llama.cpp")
    return parser


if __name__ == "__main__":
    main()
