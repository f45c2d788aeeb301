"""Models, with their defaults and limits."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.common import Page
from darkroom.generation import model_registry
from darkroom.generation.model_registry import FloatLimits, IntLimits


class Model(BaseModel):
    """Model that jobs can name, with the defaults and limits of its parameters."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(description="Send it as `model` of a job.")
    object: Literal["model"] = "model"
    revision: str = Field(description="Revision of the weights.")
    revision_of: str | None = Field(description="Model of which this is an older revision.")
    description: str = Field(description="What the model generates.")
    license: str = Field(description="License of the weights.")
    is_default: bool = Field(description="Whether jobs that name no model use it.")
    scheduler: str = Field(description="Name of the noise scheduler, as in diffusers.")
    precision: str = Field(description="Number format of the UNet's weights.")
    microbatch_size: int = Field(description="Jobs that run together at most.")
    width: IntLimits = Field(description="Pixels.")
    height: IntLimits = Field(description="Pixels.")
    num_inference_steps: IntLimits = Field(description="Denoise steps.")
    guidance_scale: FloatLimits = Field(description="Classifier-free guidance; off at 1 or less.")

    @classmethod
    def of(cls, model: model_registry.Model, *, is_default: bool) -> Self:
        """Render a model of the registry."""
        card = model.model_dump(exclude={"max_microbatch", "max_unet_rows", "on_demand"})
        return cls(**card, microbatch_size=model.max_microbatch, is_default=is_default)


class ModelList(Page[Model]):
    """Models of the installation, on one page."""
