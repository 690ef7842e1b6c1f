"""The devices of this build, and how their backends lock host memory (ggml-backend.h)."""

from __future__ import annotations

import ctypes
from typing import Any, cast

from .bindings import ggml
from .pinning import HostMemory
from .protocol import Device

# enum ggml_backend_dev_type (ggml-backend.h)
DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}
REGISTER = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_size_t)
UNREGISTER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def devices() -> tuple[Device, ...]:
    """Every device of this build, the CPU among them."""
    return tuple(_device(handle) for handle in _handles())


def host_memory() -> HostMemory | None:
    """How pages in RAM are locked for the GPUs; None where no backend of this build can.

    CUDA and HIP can; their function does nothing without GGML_CUDA_REGISTER_HOST (ggml-cuda.cu).
    """
    for handle in _handles():
        backend = ggml.ggml_backend_dev_backend_reg(handle)
        register, unregister = (
            ggml.ggml_backend_reg_get_proc_address(backend, name)
            for name in (
                b"ggml_backend_register_host_buffer",
                b"ggml_backend_unregister_host_buffer",
            )
        )
        if register and unregister:
            return HostMemory(REGISTER(register), UNREGISTER(unregister))
    return None


def _handles() -> list[int]:
    return [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]


def _device(handle: int) -> Device:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return Device(
        name=ggml.ggml_backend_dev_name(handle).decode("utf-8", "replace"),
        description=ggml.ggml_backend_dev_description(handle).decode("utf-8", "replace"),
        kind=cast(Any, DEVICE_KINDS.get(ggml.ggml_backend_dev_type(handle), "other")),
        total_bytes=total.value,
        free_bytes=free.value,
    )
