"""What is wrong with a machine, or worth knowing, and how to mend it. Pure: facts in, findings out.

A silently unused GPU, a build without the processor's features, a container's limits: each is the
difference between a model that runs well and one that doesn't, and none of them shows by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .gpus import Card, Matched, Vendor
from .host import PACKAGE, Host
from .machine import Build, Finding, Gpu, Severity

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# Without these, products with experts on the CPU take several times as long
VITAL_FEATURES = ("AVX", "AVX2", "FMA", "F16C", "NEON", "DOTPROD")
USEFUL_FEATURES = (
    "AVX512", "AVX512_VNNI", "AVX_VNNI", "AVX512_BF16", "AMX_INT8", "MATMUL_INT8", "FP16_VA",
)  # fmt: skip
# A build that uses these where they are missing ends with an illegal instruction. Newer ones are
# left out: an older kernel doesn't list them although the processor has them.
FATAL_FEATURES = ("AVX", "AVX2", "FMA", "F16C", "AVX512")

MAKERS: dict[Vendor, str] = {
    "nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel", "apple": "Apple",
}  # fmt: skip
USABLE_BY: dict[Vendor, tuple[str, ...]] = {
    "nvidia": ("CUDA", "Vulkan"),
    "amd": ("ROCm", "HIP", "Vulkan"),
    "intel": ("SYCL", "Vulkan"),
    "apple": ("MTL", "Metal"),
}
# How llama.cpp is told to build a backend (docs/build.md), and what the build needs
CMAKE_FLAGS = {
    "CUDA": "-DGGML_CUDA=on",
    "ROCm": "-DGGML_HIP=on",
    "Vulkan": "-DGGML_VULKAN=on",
    "SYCL": "-DGGML_SYCL=on",
    "MTL": "-DGGML_METAL=on",
}
NEEDED = {
    "CUDA": ("the CUDA toolkit", "nvcc"),
    "ROCm": ("ROCm", "hipcc"),
    "Vulkan": ("the Vulkan SDK", "glslc"),
}
MIN_CARD_BYTES = 2 << 30
"""What an integrated GPU of AMD's has for itself is less; a card has more."""

MIN_SHARED_BYTES = 8 << 30
TIGHT_LIMIT = 0.9
BUSY = 0.5


def findings_of(
    host: Host, build: Build, matched: Matched, broken: str = ""
) -> tuple[Finding, ...]:
    """Everything worth telling, the worst first. `broken` says why llama.cpp doesn't start."""
    found: list[Finding] = []
    if broken:
        found += engine_findings(host, broken)
    else:
        # one command for all that a rebuild mends: two would undo each other
        command = rebuild(host, *backends_to_have(host, build, matched.unused))
        found += unused_gpus(host, build, matched.unused, command)
        found += feature_findings(host, build, command)
    found += driver_findings(host)
    found += limit_findings(host)
    found += busy_gpus(matched.gpus)
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def engine_findings(host: Host, broken: str) -> Iterator[Finding]:
    """llama.cpp that isn't there, or doesn't start."""
    if host.llama_version:
        what = f"llama.cpp does not start: {broken}"
        command = rebuild(host, *host.llama_backends)
        yield Finding("error", what, "Build it on this machine. It needs a C++ compiler.", command)
    else:
        command = f"{host.pip} install {PACKAGE}"
        yield Finding("error", f"{PACKAGE} is not installed.", "Install it:", command)


# ---- GPUs ----------------------------------------------------------------------------------------


def backends_to_have(host: Host, build: Build, unused: Sequence[Card]) -> set[str]:
    """Backends of a build that can use all that is here: those it has, and those it lacks."""
    vendors = {card.vendor for card in unused if card.has_driver and is_worth_it(card)}
    lacking = {v for v in vendors if not build.backends & set(USABLE_BY[v])}
    return {*build.backends, *(backend_to_build(host, vendor) for vendor in lacking)}


def unused_gpus(
    host: Host, build: Build, unused: Sequence[Card], command: str
) -> Iterator[Finding]:
    """GPUs that are there, and that llama.cpp doesn't use."""
    for vendor in MAKERS:
        cards = [card for card in unused if card.vendor == vendor]
        with_driver = [card for card in cards if card.has_driver and is_worth_it(card)]
        without = [card for card in cards if not card.has_driver]
        if with_driver:
            yield unused_by_build(host, build, with_driver, command)
        if without and not (vendor == "nvidia" and host.cards.troubles):
            yield without_driver(vendor, without)


def is_worth_it(card: Card) -> bool:
    """Whether a model gains by a GPU. AMD's small integrated ones are no faster than the CPU."""
    if card.vendor != "amd" or card.total_bytes is None:
        return True
    return max(card.total_bytes - MIN_CARD_BYTES, card.shared_bytes - MIN_SHARED_BYTES) >= 0


def unused_by_build(host: Host, build: Build, cards: Sequence[Card], command: str) -> Finding:
    """Why one maker's GPUs with a working driver aren't used: the build, a variable, the driver."""
    vendor = cards[0].vendor
    names = listing(card_title(card) for card in cards)
    verb = "are" if len(cards) > 1 else "is"
    able = [name for name in USABLE_BY[vendor] if name in build.backends]
    hiding = [name for name in host.visibility if hides(name, vendor)]
    if able and hiding:
        shown = f"{hiding[0]}={host.visibility[hiding[0]]}"
        what = f"{names} {verb} hidden from llama.cpp by {shown}."
        return Finding("note", what, f"Unset {hiding[0]} to use all GPUs.")
    backend = able[0] if able else backend_to_build(host, vendor)
    if able:
        version = f" ({cards[0].driver_version})" if cards[0].driver_version else ""
        return Finding(
            "warning",
            f"{names} {verb} not used: llama.cpp has {backend}, but doesn't see it.",
            f"Update the driver{version}: it may be older than the build needs. Or build llama.cpp "
            f"with what is installed here. {requirements(host, backend)}",
            command,
        )
    lacking = " or ".join(USABLE_BY[vendor])
    small = all(card.vendor == "amd" and (card.total_bytes or 0) < MIN_CARD_BYTES for card in cards)
    return Finding(
        "note" if small else "warning",
        f"{names} {verb} NOT USED: this build of llama.cpp has no {lacking}.",
        f"Build it with {backend}. {requirements(host, backend)}",
        command,
    )


def without_driver(vendor: Vendor, cards: Sequence[Card]) -> Finding:
    """A GPU on the bus that no driver answers for."""
    maker, be = MAKERS[vendor], "are" if len(cards) > 1 else "is"
    container = " In a container, start it with --gpus all." if vendor == "nvidia" else ""
    return Finding(
        "warning",
        f"{listing(card.name for card in cards)} {be} NOT USED: no driver answers for it.",
        f"Install {maker}'s driver.{container}",
    )


def hides(variable: str, vendor: Vendor) -> bool:
    """Whether a variable hides the GPUs of a maker."""
    makers = {"CUDA": "nvidia", "HIP": "amd", "ROCR": "amd"}
    return makers.get(variable.partition("_")[0], vendor) == vendor


def backend_to_build(host: Host, vendor: Vendor) -> str:
    """The backend to recommend: the maker's own, where its compiler isn't a burden."""
    if vendor == "amd":
        return "ROCm" if "hipcc" in host.cards.tools else "Vulkan"
    return {"nvidia": "CUDA", "intel": "Vulkan", "apple": "MTL"}[vendor]


def requirements(host: Host, backend: str) -> str:
    """What a build needs, and whether it seems to be there."""
    name, tool = NEEDED.get(backend, ("", ""))
    missing = f" ({tool} is not on the PATH)" if tool and tool not in host.cards.tools else ""
    return f"It needs a C++ compiler{f' and {name}{missing}' if name else ''}."


def rebuild(host: Host, *backends: str) -> str:
    """The command that builds llama.cpp for this machine with these backends."""
    wanted = sorted(CMAKE_FLAGS[name] for name in set(backends) & set(CMAKE_FLAGS))
    flags = " ".join(wanted) or "-DGGML_NATIVE=on"
    pinned = f"{PACKAGE}=={host.llama_version}" if host.llama_version else PACKAGE
    setting = (
        f'$env:CMAKE_ARGS="{flags}"; ' if host.system == "Windows" else f'CMAKE_ARGS="{flags}" '
    )
    install = "install --force-reinstall --no-cache-dir --no-binary"
    return f"{setting}{host.pip} {install} {PACKAGE} {pinned}"


def driver_findings(host: Host) -> Iterator[Finding]:
    """Driver tools that are there and don't work."""
    for trouble in host.cards.troubles:
        how = "Run nvidia-smi yourself; reinstall NVIDIA's driver or restart the machine."
        yield Finding("warning", f"NVIDIA's driver is not working: {trouble}.", how, "nvidia-smi")


def busy_gpus(gpus: Iterable[Gpu]) -> Iterator[Finding]:
    """GPUs of which other programs hold a good part."""
    for gpu in gpus:
        taken = gpu.total_bytes - gpu.free_bytes
        if gpu.free_from == "driver" and not gpu.unified and taken > BUSY * gpu.total_bytes:
            what = (
                f"Other programs hold {gib(taken)} of {gpu.description}'s {gib(gpu.total_bytes)}."
            )
            yield Finding("note", what, "Close them to place more layers on it.")


# ---- processor and memory ------------------------------------------------------------------------


def feature_findings(host: Host, build: Build, command: str) -> Iterator[Finding]:
    """Features of the processor that the build doesn't use, or uses where they aren't."""
    if host.processor.translated:
        what = "This Python is an x86 program, translated on Apple silicon: slow, and without GPU."
        yield Finding("warning", what, "Install an arm64 Python, and localmoe in it.")
    has, uses = host.processor.features, build.features
    if not has or not uses:
        return
    fatal = [name for name in FATAL_FEATURES if name in uses - has]
    vital = [name for name in VITAL_FEATURES if name in has - uses]
    useful = [name for name in USEFUL_FEATURES if name in has - uses]
    how = "Build it on this machine. It needs a C++ compiler."
    if fatal:
        what = f"llama.cpp was built for {listing(fatal)}, which this processor lacks: it crashes."
        yield Finding("error", what, how, command)
    if vital:
        what = f"llama.cpp was built WITHOUT {listing(vital)}, which this processor has."
        slow = "Experts on the CPU run several times slower than they could."
        yield Finding("warning", f"{what} {slow}", how, command)
    elif useful:
        what = f"llama.cpp was built without {listing(useful)}, which this processor has."
        yield Finding("note", f"{what} Prompts may be read faster with it.", how, command)


def limit_findings(host: Host) -> Iterator[Finding]:
    """Limits of control groups and of affinity."""
    ram, cpu = host.ram, host.processor
    if ram.total_bytes < TIGHT_LIMIT * ram.machine_bytes:
        yield Finding(
            "warning",
            f"A control group (container) limits this process to {gib(ram.total_bytes)} of RAM; "
            f"the machine has {gib(ram.machine_bytes)}.",
            "Plans keep within it. Raise it where the container is started (--memory) to run more.",
        )
    if cpu.n_usable < cpu.n_physical:
        by_quota = cpu.quota is not None and cpu.quota < cpu.n_physical
        why = f"a control group's quota of {cpu.quota:g}" if by_quota else "the process's affinity"
        what = f"Of {cpu.n_physical} cores {cpu.n_usable} may be used here: {why}."
        how = "Threads are chosen to match. Raise it where the container is started (--cpus)."
        yield Finding("note", what, how if by_quota else "Threads are chosen to match.")


# ---- words ---------------------------------------------------------------------------------------


def card_title(card: Card) -> str:
    """A card and its memory in a few words."""
    return f"{card.name} ({gib(card.total_bytes)})" if card.total_bytes else card.name


def listing(names: Iterable[str]) -> str:
    """Names as a sentence lists them: a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def gib(n_bytes: int) -> str:
    """Bytes in GiB, for a sentence."""
    return f"{n_bytes / 2**30:.1f} GiB"
