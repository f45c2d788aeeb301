"""Small notes in the Ray cluster's own key-value store, which every process of it can read.

Nothing secret belongs there. The store dies with the cluster, and so do the notes.
"""

from typing import Final

from ray.experimental.internal_kv import internal_kv_get_gcs_client

_PATIENCE_S: Final = 2  #: or a cluster that is gone would hold its reader up for minutes
_NAMESPACE: Final = b"darkroom"


def read(key: str) -> str | None:
    """None when there is no such note. Raises RayError and RuntimeError when nobody answers."""
    store = internal_kv_get_gcs_client()
    if store is None:
        raise RuntimeError("this process is not connected to a Ray cluster")
    told = store.internal_kv_get(key.encode(), _NAMESPACE, timeout=_PATIENCE_S)
    return None if told is None else bytes(told).decode()


def write(key: str, text: str) -> None:
    """Replace the note. Raises as `read`."""
    store = internal_kv_get_gcs_client()
    if store is None:
        raise RuntimeError("this process is not connected to a Ray cluster")
    store.internal_kv_put(
        key.encode(), text.encode(), overwrite=True, namespace=_NAMESPACE, timeout=_PATIENCE_S
    )
