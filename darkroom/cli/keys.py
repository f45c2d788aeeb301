"""`darkroom keys`: made where the database is, by whoever may reach it."""

from datetime import timedelta
from typing import Annotated

import typer

from darkroom.accounts import api_keys, tenants
from darkroom.accounts.api_keys import Scope
from darkroom.cli.session import open_core
from darkroom.db.tables import DEFAULT_TENANT, ApiKey

app = typer.Typer(
    help="API keys. Works on the database itself (DARKROOM_DATABASE_URL).", no_args_is_help=True
)


@app.command()
def create(
    scope: Annotated[
        list[Scope] | None, typer.Option(help="Repeatable; default submit, read.")
    ] = None,
    tenant: Annotated[
        str, typer.Option(help="The tenant's id; see `darkroom tenants`.")
    ] = DEFAULT_TENANT,
    days: Annotated[
        int | None, typer.Option(min=1, help="It expires after so many; default: never.")
    ] = None,
) -> None:
    """Make a key and print it, this once."""
    lifetime = None if days is None else timedelta(days=days)
    with open_core().begin() as session:
        tenants.find(session, tenant)
        new = api_keys.create(
            session, tenant, scope or [Scope.SUBMIT, Scope.READ], lifetime=lifetime
        )
    print(new.secret)


@app.command("list")
def list_() -> None:
    """One line a key: id, tenant, beginning, scopes, state."""
    with open_core().begin() as session:
        for key in api_keys.list_all(session):
            scopes = ",".join(key.scopes)
            print(f"{key.id}  {key.tenant_id}  {key.prefix}…  {scopes}  {_state(key)}")


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "live"
    return f"expires {key.expires_at:%Y-%m-%d}"


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="KEY_ID")]) -> None:
    """The key opens nothing from the next request on."""
    with open_core().begin() as session:
        api_keys.revoke(session, key_id)
    print(f"revoked {key_id}")
