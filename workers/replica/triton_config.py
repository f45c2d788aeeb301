"""Triton's options, and whether its in-process API is available."""

from workers.replica.triton_runtime import SHARED_MEMORY_BYTES


def has_tritonserver() -> bool:
    """Return whether Triton's in-process API can be imported; it links C++ libraries."""
    try:
        import tritonserver  # noqa: F401  # NVIDIA's image has it
    except ImportError:
        return False
    return True


def python_backend_config(prefix: str) -> dict[str, str]:
    """Return the python backend's options; `prefix` names its shared memory."""
    return {
        "shm-region-prefix-name": prefix,
        "shm-default-byte-size": str(SHARED_MEMORY_BYTES),
        "shm-growth-byte-size": str(SHARED_MEMORY_BYTES),
    }
