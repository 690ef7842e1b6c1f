"""Finds out what the machine has: memory within cgroup limits, cores, devices, what is wrong.

`detect` is the whole of it. Its order is its point: drivers are asked what is free first, and
llama.cpp, whose child takes a context on each GPU by being asked, second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..engine.protocol import DeviceList
from .cpu import build_of, processor
from .diagnostics import findings_of
from .gpus import Matched, match_gpus, visible_first
from .host import Host, host_of, ram_of
from .machine import Build, Gpu, Machine
from .system import SystemAccess


def detect(ask_devices: Callable[[], DeviceList], sources: SystemAccess) -> Machine:
    """The machine that this process runs on. `ask_devices` is an engine's `devices`.

    The engine may be running already, if it was not yet asked for devices and has no model.
    Raises what `ask_devices` raises.
    """
    host = host_of(sources)
    return machine_of(host, ask_devices())


def machine_of(host: Host, devices: DeviceList | None, broken: str = "") -> Machine:
    """A machine from what was found out. Pure. Without devices, `broken` says why."""
    listed = devices.devices if devices else ()
    matched = match_gpus(
        listed,
        visible_first(host.cards.cards, host.visibility),
        host.ram.machine_bytes,
        host.ram.available_bytes,
    )
    info = devices.system_info if devices else ""
    build = build_of(info, [device.name for device in listed], host.llama_version)
    build = replace(build, backends=build.backends | host.llama_backends)
    return _machine(host, build, matched, broken)


def _machine(host: Host, build: Build, matched: Matched, broken: str) -> Machine:
    return Machine(
        ram_total_bytes=host.ram.total_bytes,
        ram_available_bytes=host.ram.available_bytes,
        n_cores=host.processor.n_usable,
        gpus=matched.gpus,
        cpu_features=host.processor.features,
        build=build,
        findings=findings_of(host, build, matched, broken),
        cpu=host.processor.name,
    )


def this_machine(gpus: Iterable[Gpu] = (), sources: SystemAccess | None = None) -> Machine:
    """The machine's RAM and cores, with the GPUs that are given; nothing is started or asked."""
    sources = sources or SystemAccess()
    ram = ram_of(sources)
    return Machine(ram.total_bytes, ram.available_bytes, n_cores(sources), tuple(gpus))


def n_cores(sources: SystemAccess | None = None) -> int:
    """Physical cores that this process may run on, within its affinity and its quota."""
    return processor(sources or SystemAccess()).n_usable
