"""`darkroom keys`: made where the database is, by whoever may reach it."""

from typing import Annotated

import typer

from darkroom import keys
from darkroom.database import Sessions, open_sessions
from darkroom.keys import Scope
from darkroom.settings import load_settings
from darkroom.tables import DEFAULT_TENANT

app = typer.Typer(
    help="API keys. Works on the database itself (DARKROOM_DATABASE_URL).", no_args_is_help=True
)


@app.command()
def create(
    scope: Annotated[
        list[Scope] | None, typer.Option(help="Repeatable; default submit, read.")
    ] = None,
    tenant: Annotated[str, typer.Option(help="The tenant's id.")] = DEFAULT_TENANT,
) -> None:
    """Make a key and print it, this once."""
    with _sessions().begin() as session:
        print(keys.create(session, tenant, scope or [Scope.SUBMIT, Scope.READ]).secret)


@app.command("list")
def list_() -> None:
    """One line a key: id, beginning, scopes, state."""
    with _sessions().begin() as session:
        for key in keys.list_all(session):
            state = "revoked" if key.revoked_at else "live"
            print(f"{key.id}  {key.prefix}…  {','.join(key.scopes)}  {state}")


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="KEY_ID")]) -> None:
    """The key opens nothing from the next request on."""
    with _sessions().begin() as session:
        keys.revoke(session, key_id)
    print(f"revoked {key_id}")


def _sessions() -> Sessions:
    return open_sessions(load_settings().database_url.get_secret_value(), pool_size=1)
