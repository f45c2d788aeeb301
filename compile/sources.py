"""Sources of a model's weights: a folder, or the Hugging Face hub."""

from pathlib import Path
from typing import Final

#: the files of the parts; the root's single-file checkpoints would double the download
INCLUDED: Final = ("model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors")
EXCLUDED: Final = ("*.fp16.safetensors", "*.non_ema.safetensors", "safety_checker/*")


class ModelNotFound(ValueError):
    """The model is neither a diffusers folder nor on the hub."""


def find_model(model: str, revision: str | None) -> Path:
    """Return a diffusers folder; download that of a hub id. Raises ModelNotFound."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelNotFound(f"{folder} has no model_index.json: it is not a diffusers folder")
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
                allow_patterns=list(INCLUDED),
                ignore_patterns=list(EXCLUDED),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{model} cannot be downloaded from the hub ({error}); gated models need HF_TOKEN, "
            "machines without a network need a local folder"
        ) from error
