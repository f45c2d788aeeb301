"""/v1/models: the models that jobs can name."""

from fastapi import APIRouter

from api.dependencies import Deps, TenantId
from api.schemas.models import Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="List models")
def list_models(_: TenantId, deps: Deps) -> ModelList:
    """Return every model with the defaults and limits of its parameters."""
    registry = deps.registry
    models = [
        Model.of(model, is_default=model.name == registry.default)
        for model in registry.models.values()
    ]
    return ModelList(data=models, next_cursor=None)
