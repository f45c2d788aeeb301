"""Where a model's weights come from: a folder, or the Hugging Face hub."""

from pathlib import Path
from typing import Final

#: what the parts are made from; the root's single-file checkpoints would double the download
WANTED: Final = ("model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors")
UNWANTED: Final = ("*.fp16.safetensors", "*.non_ema.safetensors", "safety_checker/*")


class ModelNotFound(ValueError):
    """There is no such model."""


def find_model(model: str, revision: str | None) -> Path:
    """A diffusers folder: this one, or that of a hub id, downloaded. Raises ModelNotFound."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelNotFound(f"{folder} has no model_index.json: it is no diffusers folder")
        return folder
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise ModelNotFound(f"{model} is neither a folder nor a hub id like owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{model} cannot be fetched from the hub ({error}); gated models need HF_TOKEN, "
            "machines without a network a local folder"
        ) from error
