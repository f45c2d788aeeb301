"""Triton config."""

from workers.replica.triton_runtime import SHARED_MEMORY_BYTES


def has_tritonserver() -> bool:
    """Whether Triton's in-process API works here. Finding it is not enough: it links C++."""
    try:
        import tritonserver  # noqa: F401  # NVIDIA's image has it
    except ImportError:
        return False
    return True


def _python_backend(prefix: str) -> dict[str, str]:
    return {
        "shm-region-prefix-name": prefix,
        "shm-default-byte-size": str(SHARED_MEMORY_BYTES),
        "shm-growth-byte-size": str(SHARED_MEMORY_BYTES),
    }
