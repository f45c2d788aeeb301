"""Whom things belong to: their share of the machine, and for how long what is theirs is kept."""

from collections.abc import Sequence

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from darkroom.db.tables import Tenant
from darkroom.errors import NotFound
from darkroom.ids import new_id


def create(session: Session, name: str, *, weight: float = 1) -> str:
    """A tenant of that share, and its id; of two that both wait, weight 2 gets twice weight 1."""
    tenant_id = new_id("ten")
    session.execute(insert(Tenant).values(id=tenant_id, name=name, weight=weight))
    return tenant_id


def find(session: Session, tenant_id: str) -> Tenant:
    """Raises NotFound."""
    tenant = session.get(Tenant, tenant_id)
    if tenant is None:
        raise NotFound("tenant", tenant_id)
    return tenant


def list_all(session: Session) -> Sequence[Tenant]:
    """By name."""
    return session.scalars(select(Tenant).order_by(Tenant.name, Tenant.id)).all()


def set_weight(session: Session, tenant_id: str, weight: float) -> None:
    """Change its share, from the next job that it submits. Raises NotFound."""
    find(session, tenant_id)
    session.execute(update(Tenant).where(Tenant.id == tenant_id).values(weight=weight))


def set_retention(session: Session, tenant_id: str, days: int | None) -> None:
    """For how long pictures and prompts stay after their end; None: the setting. Raises NotFound.

    Holds for what has ended already, too.
    """
    find(session, tenant_id)
    session.execute(update(Tenant).where(Tenant.id == tenant_id).values(retention_days=days))
