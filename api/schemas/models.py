"""Models."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from darkroom.generation.model_registry import FloatLimits, IntLimits, Model


class ModelView(BaseModel):
    """What may be asked of a model, and what it does when not told."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    object: Literal["model"] = "model"
    revision: str
    revision_of: str | None  #: the model that this is an older revision of
    description: str
    license: str
    is_default: bool
    scheduler: str
    precision: str
    microbatch_size: int
    width: IntLimits
    height: IntLimits
    num_inference_steps: IntLimits
    guidance_scale: FloatLimits

    @classmethod
    def of(cls, model: Model, *, is_default: bool) -> Self:
        """The model as clients see it."""
        card = model.model_dump(exclude={"max_microbatch", "max_unet_rows", "on_demand"})
        return cls(**card, microbatch_size=model.max_microbatch, is_default=is_default)
