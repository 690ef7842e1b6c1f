"""The machine that models are placed on, as data: memory, cores, GPUs, and what is wrong with it.

detect.py finds it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device that layers can be placed on. `free_bytes` is what can still be allocated.

    `free_from` says whose figure that is: the driver's, read with no child of ours running, or
    llama.cpp's own, from which the context of the child that was asked is already gone. A
    `unified` GPU has no memory of its own: what it takes is gone from RAM, and `free_bytes` is
    never above what is available there.
    """

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    kind: Literal["gpu", "igpu"] = "gpu"
    unified: bool = False
    free_from: Literal["driver", "llama.cpp"] = "llama.cpp"
    driver_version: str = ""


@dataclass(frozen=True, slots=True)
class Build:
    """The build of llama.cpp: version of its package, its backends, features of its CPU code."""

    version: str = ""
    backends: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Finding:
    """A thing that is wrong ("error": nothing can run; "warning") or worth knowing ("note").

    `command` does what `how_to_mend` says, ready to be copied; empty where no command does.
    """

    severity: Severity
    what: str
    how_to_mend: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to place a model on. Memory is in bytes, `n_cores` are physical ones.

    RAM and cores are those that this process may use, within control groups, affinity and quota;
    `cpu` is the processor's name,
    `gpus` those that llama.cpp can use, in its own order. `cpu_features` (the processor's) and
    `build` (llama.cpp's) are empty where unknown. `findings` are what a person should know.
    """

    ram_total_bytes: int
    ram_available_bytes: int
    n_cores: int
    gpus: tuple[Gpu, ...] = ()
    cpu_features: frozenset[str] = frozenset()
    build: Build = Build()
    findings: tuple[Finding, ...] = ()
    cpu: str = ""
