"""/v1/models: what can be drawn with."""

from fastapi import APIRouter

from api.dependencies import Deps, TenantId
from api.schemas.common import Page
from api.schemas.models import ModelView

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(_: TenantId, deps: Deps) -> Page[ModelView]:
    """Each model's parameters, defaults and limits."""
    registry = deps.registry
    views = [
        ModelView.of(model, is_default=model.name == registry.default)
        for model in registry.models.values()
    ]
    return Page(data=views, next_cursor=None)
