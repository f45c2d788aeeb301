"""`darkroom tenants`: their weight in the queue, and how long their images are kept."""

from typing import Annotated

import typer

from darkroom.cli.session import database_session, fail

app = typer.Typer(
    help="Manage tenants, on the database itself (DARKROOM_DATABASE_URL).", no_args_is_help=True
)
_MIN_WEIGHT, _MAX_WEIGHT = 0.001, 1000
_WEIGHT_HELP = "Share of the queue: of two tenants with queued jobs, weight 2 gets twice weight 1."


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    weight: Annotated[float, typer.Option(min=_MIN_WEIGHT, max=_MAX_WEIGHT, help=_WEIGHT_HELP)] = 1,
) -> None:
    """Create a tenant and print its id, for `darkroom keys create --tenant`."""
    with database_session() as session:
        from darkroom.accounts import tenants

        tenant_id = tenants.create(session, name, weight=weight)
    print(tenant_id)


@app.command("list")
def list_() -> None:
    """List tenants, one a line: id, weight, name."""
    with database_session() as session:
        from darkroom.accounts import tenants

        for tenant in tenants.list_all(session):
            print(f"{tenant.id}  {tenant.weight:g}  {tenant.name}")


@app.command()
def update(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT_ID")],
    weight: Annotated[
        float | None,
        typer.Option(
            min=_MIN_WEIGHT,
            max=_MAX_WEIGHT,
            help=f"{_WEIGHT_HELP} From the next job submitted. Default: unchanged.",
        ),
    ] = None,
    retention_days: Annotated[
        str | None,
        typer.Option(
            metavar="DAYS|none",
            help="Days that images and prompts are kept (a batch can override it); `none`: as "
            "long as DARKROOM_RETENTION_DAYS says. Default: unchanged.",
        ),
    ] = None,
) -> None:
    """Change a tenant's weight, its retention, or both."""
    if weight is None and retention_days is None:
        raise fail("nothing to change: give --weight, --retention-days, or both")
    days = None if retention_days is None else _days(retention_days)
    with database_session() as session:
        from darkroom.accounts import tenants

        if weight is not None:
            tenants.set_weight(session, tenant_id, weight)
        if retention_days is not None:
            tenants.set_retention(session, tenant_id, days)
    if weight is not None:
        print(f"{tenant_id}  weight {weight:g}")
    if retention_days is not None:
        print(f"{tenant_id}  retention {'as the installation' if days is None else f'{days} days'}")


def _days(text: str) -> int | None:
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise fail(f"--retention-days must be a number of days from 1, or none; not {text!r}")
    return int(text)
