"""The signatures of all of ggml that the engine calls (ggml/include/ggml.h, ggml-backend.h,
ggml-alloc.h): llama_cpp declares those of llama.cpp alone.
"""

from __future__ import annotations

import ctypes
from typing import Any

_handle = ctypes.c_void_p
_int, _size, _float = ctypes.c_int, ctypes.c_size_t, ctypes.c_float


_long, _sizes = ctypes.c_int64, ctypes.POINTER(_size)


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", _size), ("mem_buffer", _handle), ("no_alloc", ctypes.c_bool)]


SIGNATURES: tuple[tuple[str, Any, list[Any]], ...] = (
    ("ggml_init", _handle, [InitParams]),
    ("ggml_free", None, [_handle]),
    ("ggml_type_name", ctypes.c_char_p, [_int]),
    ("ggml_is_quantized", ctypes.c_bool, [_int]),
    ("ggml_nbytes", _size, [_handle]),
    ("ggml_op_name", ctypes.c_char_p, [_int]),
    ("ggml_tensor_overhead", _size, []),
    ("ggml_graph_overhead_custom", _size, [_size, ctypes.c_bool]),
    ("ggml_new_tensor_4d", _handle, [_handle, _int, _long, _long, _long, _long]),
    ("ggml_add", _handle, [_handle] * 3),
    ("ggml_mul", _handle, [_handle] * 3),
    ("ggml_mul_mat_id", _handle, [_handle] * 4),
    ("ggml_flash_attn_ext", _handle, [_handle] * 5 + [_float] * 3),
    ("ggml_new_graph_custom", _handle, [_handle, _size, ctypes.c_bool]),
    ("ggml_build_forward_expand", None, [_handle, _handle]),
    ("ggml_backend_dev_count", _size, []),
    ("ggml_backend_dev_get", _handle, [_size]),
    ("ggml_backend_dev_by_type", _handle, [_int]),
    ("ggml_backend_dev_name", ctypes.c_char_p, [_handle]),
    ("ggml_backend_dev_description", ctypes.c_char_p, [_handle]),
    ("ggml_backend_dev_type", _int, [_handle]),
    ("ggml_backend_dev_memory", None, [_handle, _sizes, _sizes]),
    ("ggml_backend_dev_init", _handle, [_handle, ctypes.c_char_p]),
    ("ggml_backend_dev_supports_op", ctypes.c_bool, [_handle, _handle]),
    ("ggml_backend_dev_host_buffer_type", _handle, [_handle]),
    ("ggml_backend_dev_backend_reg", _handle, [_handle]),
    ("ggml_backend_reg_get_proc_address", _handle, [_handle, ctypes.c_char_p]),
    ("ggml_backend_free", None, [_handle]),
    ("ggml_backend_alloc_ctx_tensors", _handle, [_handle, _handle]),
    ("ggml_backend_cpu_buffer_type", _handle, []),
    ("ggml_backend_buft_name", ctypes.c_char_p, [_handle]),
    ("ggml_backend_buft_alloc_buffer", _handle, [_handle, _size]),
    ("ggml_backend_buffer_name", ctypes.c_char_p, [_handle]),
    ("ggml_backend_buffer_get_base", _handle, [_handle]),
    ("ggml_backend_buffer_set_usage", None, [_handle, _int]),
    ("ggml_backend_buffer_free", None, [_handle]),
    ("ggml_backend_graph_compute", _int, [_handle, _handle]),
    ("ggml_backend_synchronize", None, [_handle]),
    ("ggml_backend_tensor_alloc", _int, [_handle] * 3),
    ("ggml_backend_tensor_memset", None, [_handle, ctypes.c_uint8, _size, _size]),
    ("ggml_backend_tensor_set", None, [_handle, _handle, _size, _size]),
    ("ggml_backend_tensor_get", None, [_handle, _handle, _size, _size]),
    ("ggml_backend_tensor_copy", None, [_handle, _handle]),
)


def declare(library: Any) -> Any:
    """Tell ctypes all of them; gives the library."""
    for name, result, arguments in SIGNATURES:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
