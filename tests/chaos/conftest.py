"""The system and the table. Without `--chaos` only the short selection of rows runs."""

import random

import pytest

from darkroom.settings import HOME
from tests.chaos import report
from tests.chaos.run import running
from tests.chaos.system import BackingServers, SystemUnderTest

FOLDER = HOME / ".darkroom" / "chaos"
results = []


def pytest_collection_modifyitems(config, items):
    """The whole matrix has the rows of the short selection in it."""
    if config.getoption("--chaos"):
        short = [item for item in items if item.path.name == "test_short.py"]
        config.hook.pytest_deselected(items=short)
        items[:] = [item for item in items if item not in short]


def pytest_terminal_summary(terminalreporter, config):
    if not results:
        return
    seed = config.getoption("--chaos-seed")
    terminalreporter.section("fault matrix")
    terminalreporter.write_line(report.table(results, seed=seed))
    if config.getoption("--chaos"):
        terminalreporter.write_line(f"kept in {report.keep(results, seed=seed, folder=FOLDER)}")


@pytest.fixture(scope="session")
def backing_servers(_postgres, _redis, _s3, migrated_template, server_dir):
    s3, s3_settings = _s3
    return BackingServers(
        postgres=_postgres,
        redis=_redis,
        s3=s3,
        s3_settings=s3_settings,
        objects=server_dir / "objects",
        template=migrated_template,
    )


@pytest.fixture(scope="package")  # not longer: other tests want the machine
def system(backing_servers, tmp_path_factory):
    opened = SystemUnderTest(backing_servers, tmp_path_factory.mktemp("system"))
    yield opened
    opened.close()


@pytest.fixture
def rng(request):
    """The same for every run with the same seed."""
    return random.Random(f"{request.config.getoption('--chaos-seed')} {request.node.name}")


@pytest.fixture
def row(system, rng, record):
    """`with row("F01", "kill -9 ..."):` runs one row of the matrix on the system."""

    def run(name, fault, **how):
        return running(name, fault, how.pop("on", system), rng, record, **how)

    return run


@pytest.fixture
def record(request):
    """Adds a line to the table, and keeps what there is of it."""

    def note(result):
        results.append(result)
        if request.config.getoption("--chaos"):
            report.keep(results, seed=request.config.getoption("--chaos-seed"), folder=FOLDER)

    return note
