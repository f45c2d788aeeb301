"""Row validator: turns a row into jobs, or into all of its problems. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Required

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from darkroom.errors import InputProblem, InvalidInput
from darkroom.generation.model_registry import ModelRegistry
from darkroom.generation.params import MAX_SEED, Label, LongText, Prompt, Seed, random_seed
from darkroom.generation.validation import input_problems
from darkroom.imports import columns
from darkroom.imports.columns import NumberStyle, RowInput
from darkroom.imports.expansion import variants
from darkroom.imports.records import Record
from darkroom.jobs.bulk_insert import JobTemplate, NewJob
from darkroom.status import Expand, Priority
from darkroom.webhooks import endpoints
from darkroom.webhooks.url_policy import UrlPolicy

MAX_JOBS_PER_ROW: Final = 10_000
_MAX_TEMPLATES: Final = 1_000  #: cached at once
#: fields that the query may set for all rows; the excluded names belong to the batch there
DEFAULTS: Final = tuple(
    sorted(
        RowInput.model_fields.keys()
        - {"prompt", "custom_id", "label", "webhook_url", "webhook_events"}
    )
)


class PerRowFields(TypedDict, total=False):
    """Fields that a row seldom shares with another, under `RowInput`'s rules."""

    __pydantic_config__ = RowInput.model_config  # type: ignore[misc]  # pydantic's documented way
    prompt: Required[Prompt]
    negative_prompt: LongText
    seed: Seed | None
    custom_id: Label | None


_PER_ROW: Final = frozenset(PerRowFields.__annotations__)
_validate_fields: Final = TypeAdapter(PerRowFields).validate_python


@dataclass(frozen=True)
class ImportOptions:
    """Options that apply to all rows of a file."""

    registry: ModelRegistry
    policy: UrlPolicy  #: for the rows' webhook URLs
    defaults: Mapping[str, object] = field(default_factory=dict)
    expand: Expand | None = None


def read_defaults(given: Iterable[tuple[str, str]], *, lists: bool) -> dict[str, object]:
    """Parse the default values of all rows. Raise InvalidInput, which names every bad one."""
    values: dict[str, object] = {}
    problems = []
    for name, text in given:
        try:
            column = _default_column(name, values)
            values[column] = columns.parse(column, text, NumberStyle(lists=lists))
        except InvalidInput as invalid:
            problems += invalid.problems
    single = {name: value for name, value in values.items() if not isinstance(value, list)}
    try:
        RowInput.model_validate({"prompt": "any"} | single)
    except ValidationError as error:
        problems += input_problems(error)
    if problems:
        raise InvalidInput(
            [
                InputProblem(("query", *problem.loc), problem.code, problem.message)
                for problem in problems
            ]
        )
    return values


def _default_column(name: str, seen: Mapping[str, object]) -> str:
    column = columns.canonical(name)
    if column not in DEFAULTS:
        message = f"no such parameter; a default may be one of {', '.join(DEFAULTS)}"
        raise columns.bad_cell(name[:64], "unknown_parameter", message)
    if column in seen:
        raise columns.bad_cell(name, "duplicate_parameter", "is given twice")
    return column


class RowValidator:
    """Validator of the rows of one file, in order.

    The fields that rows share are validated once and kept as a `JobTemplate`; the next rows with
    the same ones validate only their `PerRowFields`. A row with a problem is validated in full.
    """

    def __init__(self, options: ImportOptions) -> None:
        self._options = options
        self._defaults = options.defaults
        self._custom_ids: set[str] = set()  #: of the rows so far
        self._templates: dict[str, JobTemplate] = {}  #: by the shared fields

    def __call__(self, record: Record) -> list[NewJob]:
        """Return the row's jobs, in order. Raise InvalidInput with all of its problems."""
        problems = record.problems
        if record.values is not None:
            try:
                values = {**self._defaults, **record.values} if self._defaults else record.values
                jobs = self._jobs(record.number, values)
            except ValidationError as error:
                problems = _merge_problems(problems, input_problems(error))
            except InvalidInput as error:
                problems = _merge_problems(problems, error.problems)
            else:
                if not problems:
                    return jobs
        raise InvalidInput([_in_row(record.number, problem) for problem in problems])

    def _jobs(self, number: int, values: dict[str, object]) -> list[NewJob]:
        self._check_unique(values.get("custom_id"))
        if self._options.expand is None:
            return _images(number, 0, *self._validate(values))
        if values.get("seed") is None:  # one for all variants: only the swept fields differ
            values["seed"] = random_seed()
        jobs: list[NewJob] = []
        for variant in variants(values, self._options.expand):
            jobs += _images(number, len(jobs), *self._validate(variant))
            if len(jobs) > MAX_JOBS_PER_ROW:
                message = f"makes more than {MAX_JOBS_PER_ROW:,} jobs from one row"
                raise columns.bad_cell("num_images", "too_many_jobs", message)
        return jobs

    def _check_unique(self, custom_id: object) -> None:
        if isinstance(custom_id, str):
            if custom_id in self._custom_ids:
                message = "duplicate custom_id (already used in an earlier row)"
                raise columns.bad_cell("custom_id", "not_unique", message)
            self._custom_ids.add(custom_id)

    def _validate(self, values: dict[str, object]) -> tuple[JobTemplate, PerRowFields]:
        per_row: dict[str, object] = {}
        shared: list[object] = []
        for name, value in values.items():
            if name in _PER_ROW:
                per_row[name] = value
            else:
                shared += (name, value)
        key = repr(shared)  # as text, because 1, 1.0 and True are the same key, and lists are none
        template = self._templates.get(key)
        if template is not None:
            try:
                return template, _validate_fields(per_row)
            except ValidationError:
                pass  # reported below, with the row's other problems
        row = RowInput.model_validate(values)
        if len(self._templates) == _MAX_TEMPLATES:
            self._templates.clear()
        template = self._templates[key] = self._template(row)
        return template, _validate_fields(per_row)

    def _template(self, row: RowInput) -> JobTemplate:
        if row.webhook_url is not None:
            endpoints.check_own_url(row.webhook_url, self._options.policy)
        params = self._options.registry.resolve(row)
        key = self._options.registry.models[params.model].microbatch_key(params)
        return JobTemplate.of(row, params, key, default=Priority.BULK, num_images=row.num_images)


def _images(number: int, first: int, template: JobTemplate, fields: PerRowFields) -> list[NewJob]:
    """Return `num_images` jobs that differ only in their seeds, which count up."""
    prompt, negative_prompt = fields["prompt"], fields.get("negative_prompt", "")
    custom_id, seed = fields.get("custom_id"), fields.get("seed")
    if seed is None:
        seed = random_seed()
    if seed + template.num_images - 1 > MAX_SEED:
        raise columns.bad_cell("seed", "out_of_range", "seed + num_images is too large")
    if template.num_images == 1:
        return [NewJob(template, prompt, negative_prompt, seed, number, first, custom_id)]
    return [
        NewJob(template, prompt, negative_prompt, seed + image, number, first + image, custom_id)
        for image in range(template.num_images)
    ]


def _merge_problems(cells: list[InputProblem], fields: list[InputProblem]) -> list[InputProblem]:
    """Join both, without the field problems (such as missing) of cells that could not be read."""
    unread = {problem.loc for problem in cells}
    return cells + [problem for problem in fields if problem.loc[:1] not in unread]


def _in_row(number: int, problem: InputProblem) -> InputProblem:
    """Add the row number to the location of a problem."""
    return InputProblem(("row", number, *problem.loc), problem.code, problem.message)
