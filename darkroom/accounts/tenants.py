"""Tenants: owners of jobs, with a share of the machine and a retention period."""

from collections.abc import Sequence

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from darkroom.db.tables import Tenant
from darkroom.errors import NotFound
from darkroom.ids import new_id


def create(session: Session, name: str, *, weight: float = 1) -> str:
    """Create a tenant and return its id; weight 2 gets twice the share of weight 1."""
    tenant_id = new_id("ten")
    session.execute(insert(Tenant).values(id=tenant_id, name=name, weight=weight))
    return tenant_id


def find(session: Session, tenant_id: str) -> Tenant:
    """Return the tenant. Raises NotFound."""
    tenant = session.get(Tenant, tenant_id)
    if tenant is None:
        raise NotFound("tenant", tenant_id)
    return tenant


def list_all(session: Session) -> Sequence[Tenant]:
    """Return all tenants, by name."""
    return session.scalars(select(Tenant).order_by(Tenant.name, Tenant.id)).all()


def set_weight(session: Session, tenant_id: str, weight: float) -> None:
    """Set the share of jobs submitted from now on. Raises NotFound."""
    find(session, tenant_id)
    session.execute(update(Tenant).where(Tenant.id == tenant_id).values(weight=weight))


def set_retention(session: Session, tenant_id: str, days: int | None) -> None:
    """Set how many days images and prompts are kept; None means the installation's setting.

    Applies to finished jobs too. Raises NotFound.
    """
    find(session, tenant_id)
    session.execute(update(Tenant).where(Tenant.id == tenant_id).values(retention_days=days))
