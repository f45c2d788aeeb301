"""Key-value store of the Ray cluster, for small texts that each of its processes can read.

Nothing secret belongs there. The store and its texts are gone when the cluster is.
"""

from typing import Any, Final

from ray.experimental.internal_kv import internal_kv_get_gcs_client

_TIMEOUT_S: Final = 2  #: else a cluster that is gone blocks the reader for minutes
_NAMESPACE: Final = b"darkroom"


def read(key: str) -> str | None:
    """Return the text, or None. Raises RayError and RuntimeError if the cluster does not answer."""
    value = _store().internal_kv_get(key.encode(), _NAMESPACE, timeout=_TIMEOUT_S)
    return None if value is None else bytes(value).decode()


def write(key: str, text: str) -> None:
    """Replace the text. Raises as `read`."""
    _store().internal_kv_put(
        key.encode(), text.encode(), overwrite=True, namespace=_NAMESPACE, timeout=_TIMEOUT_S
    )


def _store() -> Any:
    store = internal_kv_get_gcs_client()
    if store is None:
        raise RuntimeError("this process is not connected to a Ray cluster")
    return store
