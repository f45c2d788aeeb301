"""/v1/models: what can be drawn with."""

from fastapi import APIRouter

from api.dependencies import TenantId, Uses
from api.schemas.common import Page
from api.schemas.models import ModelView

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(_: TenantId, use: Uses) -> Page[ModelView]:
    """Each model's parameters, defaults and limits."""
    catalogue = use.catalogue
    views = [
        ModelView.of(model, is_default=model.name == catalogue.default)
        for model in catalogue.models.values()
    ]
    return Page(data=views, next_cursor=None)
