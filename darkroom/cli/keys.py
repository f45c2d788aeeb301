"""`darkroom keys`: API keys, made by an operator on the database itself."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from darkroom.cli.session import database_session
from darkroom.status import Scope

if TYPE_CHECKING:
    from darkroom.db.tables import ApiKey

app = typer.Typer(
    help="Manage API keys, on the database itself (DARKROOM_DATABASE_URL).", no_args_is_help=True
)


@app.command()
def create(
    scope: Annotated[
        list[Scope] | None, typer.Option(help="Repeatable. Default: submit and read.")
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Tenant id, see `darkroom tenants list`. Default: the default tenant."),
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, help="Days until the key expires. Default: never.")
    ] = None,
) -> None:
    """Create an API key and print its secret, which is not shown again."""
    scopes = scope or [Scope.SUBMIT, Scope.READ]
    lifetime = None if days is None else timedelta(days=days)
    with database_session() as session:
        from darkroom.accounts import api_keys, tenants
        from darkroom.db.tables import DEFAULT_TENANT

        tenant_id = tenant or DEFAULT_TENANT
        tenants.find(session, tenant_id)
        key = api_keys.create(session, tenant_id, scopes, lifetime=lifetime)
    print(key.secret)


@app.command("list")
def list_() -> None:
    """List API keys, one a line: id, tenant, prefix, scopes, state."""
    with database_session() as session:
        from darkroom.accounts import api_keys

        for key in api_keys.list_all(session):
            scopes = ",".join(key.scopes)
            print(f"{key.id}  {key.tenant_id}  {key.prefix}…  {scopes}  {_state(key)}")


def _state(key: "ApiKey") -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "live"
    return f"expires {key.expires_at:%Y-%m-%d}"


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="KEY_ID")]) -> None:
    """Revoke an API key; the next request with it is refused."""
    with database_session() as session:
        from darkroom.accounts import api_keys

        api_keys.revoke(session, key_id)
    print(f"revoked {key_id}")
