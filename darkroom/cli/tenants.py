"""`darkroom tenants`: who shares the machine, and in what proportion."""

from typing import Annotated

import typer

from darkroom.accounts import tenants
from darkroom.cli.session import open_core

app = typer.Typer(
    help="Tenants. Works on the database itself (DARKROOM_DATABASE_URL).", no_args_is_help=True
)
TenantId = Annotated[str, typer.Argument(metavar="TENANT_ID")]
Weight = Annotated[
    float,
    typer.Option(min=0.001, max=1000, help="Share while several wait: 2 gets twice as much as 1."),
]


@app.command()
def create(name: Annotated[str, typer.Argument(metavar="NAME")], weight: Weight = 1) -> None:
    """Make a tenant and print its id, for `darkroom keys create --tenant`."""
    with open_core().begin() as session:
        print(tenants.create(session, name, weight=weight))


@app.command("list")
def list_() -> None:
    """One line a tenant: id, weight, name."""
    with open_core().begin() as session:
        for tenant in tenants.list_all(session):
            print(f"{tenant.id}  {tenant.weight:g}  {tenant.name}")


@app.command()
def weigh(tenant_id: TenantId, weight: Weight) -> None:
    """Change a tenant's share, from the next job that it submits."""
    with open_core().begin() as session:
        tenants.set_weight(session, tenant_id, weight)
    print(f"{tenant_id} now weighs {weight:g}")


@app.command()
def keep(
    tenant_id: TenantId,
    days: Annotated[
        int | None, typer.Argument(min=1, help="Left out: as long as the installation's setting.")
    ] = None,
) -> None:
    """For how long its pictures and prompts are kept, where a batch says nothing else."""
    with open_core().begin() as session:
        tenants.set_retention(session, tenant_id, days)
    print(f"{tenant_id}: {'the setting' if days is None else f'{days} days'}")
