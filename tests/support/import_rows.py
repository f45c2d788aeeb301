"""Reading a file of rows into jobs, as the importer does, and tables that are generated for it."""

import io
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from darkroom.errors import InvalidInput
from darkroom.generation.model_registry import ModelRegistry
from darkroom.imports import formats, row_validator
from darkroom.imports.row_validator import ImportOptions
from darkroom.jobs.bulk_insert import NewJob
from darkroom.media_types import Format
from darkroom.settings import Settings
from darkroom.status import Expand
from darkroom.webhooks.url_policy import policy_of

POLICY = policy_of(Settings())
few = hypothesis_settings(max_examples=40)
prompts = st.text(
    st.characters(blacklist_categories=("Cc", "Cs"), whitelist_characters="\n\t"),
    min_size=1,
    max_size=200,
).filter(lambda text: text.strip())


class JobColumns:
    """All columns of a new job as attributes: its own and those of its template."""

    def __init__(self, job: NewJob) -> None:
        vars(self).update(job.template.columns | job._asdict())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def read_jobs(
    registry: ModelRegistry,
    text: str | bytes,
    kind: Format = Format.CSV,
    *,
    expand: Expand | None = None,
    defaults: Iterable[tuple[str, str]] = (),
) -> list[JobColumns]:
    """Return every job of every row. Raise InvalidInput with the problems of all rows."""
    body = text if isinstance(text, bytes) else text.encode()
    lists = expand is not None
    values = row_validator.read_defaults(defaults, lists=lists)
    validate = row_validator.RowValidator(ImportOptions(registry, POLICY, values, expand))
    jobs: list[JobColumns] = []
    found = []
    for record in formats.read_table(io.BytesIO(body), kind, lists=lists).records:
        try:
            jobs += map(JobColumns, validate(record))
        except InvalidInput as invalid:
            found += invalid.problems
    if found:
        raise InvalidInput(found)
    return jobs


def problems(
    registry: ModelRegistry, text: str | bytes, kind: Format = Format.CSV, **options: Any
) -> list[tuple[tuple[str | int, ...], str]]:
    """Return the location and code of every problem of a file that is refused."""
    with pytest.raises(InvalidInput) as refused:
        read_jobs(registry, text, kind, **options)
    return [(problem.loc, problem.code) for problem in refused.value.problems]
