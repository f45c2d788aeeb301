"""The rows of a file into jobs, or into everything that is wrong with them. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from pydantic import ValidationError

from darkroom import columns, webhooks
from darkroom.addresses import Policy
from darkroom.catalogue import Catalogue
from darkroom.columns import RowInput, Style
from darkroom.errors import InputProblem, InvalidInput
from darkroom.jobs import Submission
from darkroom.params import MAX_SEED, GenerationParams, draw_seed
from darkroom.problems import input_problems
from darkroom.records import Record
from darkroom.sweeps import Expand, variants

MAX_JOBS_PER_ROW: Final = 10_000
#: fields that the query may set for all rows; what it says by these names is said of the batch
DEFAULTS: Final = tuple(
    sorted(
        RowInput.model_fields.keys()
        - {"prompt", "custom_id", "label", "webhook_url", "webhook_events"}
    )
)


@dataclass(frozen=True)
class Plan:
    """What all rows of a file have in common."""

    catalogue: Catalogue
    policy: Policy  #: of the URLs that webhooks may go to
    defaults: Mapping[str, object] = field(default_factory=dict)
    expand: Expand | None = None


def read_defaults(given: Iterable[tuple[str, str]], *, lists: bool) -> dict[str, object]:
    """Values for all rows that say nothing else. Raises InvalidInput, naming every bad one."""
    values: dict[str, object] = {}
    problems = []
    for name, text in given:
        try:
            column = _default_column(name, values)
            values[column] = columns.parse(column, text, Style(lists=lists))
        except InvalidInput as invalid:
            problems += invalid.problems
    single = {name: value for name, value in values.items() if not isinstance(value, list)}
    try:
        RowInput.model_validate({"prompt": "any"} | single)
    except ValidationError as error:
        problems += input_problems(error)
    if problems:
        raise InvalidInput(
            [InputProblem(("query", *found.loc), found.code, found.message) for found in problems]
        )
    return values


def _default_column(name: str, seen: Mapping[str, object]) -> str:
    column = columns.canonical(name)
    if column not in DEFAULTS:
        message = f"no such parameter; a default may be one of {', '.join(DEFAULTS)}"
        raise columns.bad_cell(name[:64], "unknown_parameter", message)
    if column in seen:
        raise columns.bad_cell(name, "doubled_parameter", "is given twice")
    return column


def judge(record: Record, plan: Plan, custom_ids: set[str]) -> list[Submission]:
    """The row's jobs, in order. Raises InvalidInput with all that is wrong with it.

    `custom_ids` are those of earlier rows; the row's own is added.
    """
    problems = record.problems
    if record.values is not None:
        try:
            submissions = _submissions(record.number, record.values, plan, custom_ids)
        except ValidationError as error:
            problems = _joined(problems, input_problems(error))
        except InvalidInput as error:
            problems = _joined(problems, error.problems)
        else:
            if not problems:
                return submissions
    raise InvalidInput([_in_row(record.number, problem) for problem in problems])


def _joined(cells: list[InputProblem], fields: list[InputProblem]) -> list[InputProblem]:
    """Of a cell that could not be read it need not be said that its field is missing."""
    known = {problem.loc for problem in cells}
    return cells + [problem for problem in fields if problem.loc[:1] not in known]


def _submissions(
    number: int, values: Mapping[str, object], plan: Plan, custom_ids: set[str]
) -> list[Submission]:
    values = {**plan.defaults, **values}
    custom_id = values.get("custom_id")
    if isinstance(custom_id, str):
        _check_custom_id(custom_id, custom_ids)
    made: list[Submission] = []
    for row in [values] if plan.expand is None else _variants(values, plan.expand):
        job = RowInput.model_validate(row)
        if job.webhook_url is not None:
            webhooks.vet_own_url(job.webhook_url, plan.policy)
        first = plan.catalogue.resolve(job)
        key = plan.catalogue.models[first.model].microbatch_key(first)
        images = [first] if job.num_images == 1 else _images(first, job.num_images)
        for params in images:
            made.append(Submission(job, params, key, number, len(made), job.custom_id))
        if len(made) > MAX_JOBS_PER_ROW:
            message = f"makes more than {MAX_JOBS_PER_ROW:,} jobs of one row"
            raise columns.bad_cell("num_images", "too_many_jobs", message)
    return made


def _variants(values: dict[str, object], expand: Expand) -> Iterator[dict[str, object]]:
    if values.get("seed") is None:  # one for all, so that only what is swept differs
        values["seed"] = draw_seed()
    return variants(values, expand)


def _images(first: GenerationParams, count: int) -> list[GenerationParams]:
    """`num_images` pictures of one row: the same but for seeds that count up."""
    if first.seed + count - 1 > MAX_SEED:
        raise columns.bad_cell("seed", "out_of_range", "seed + num_images is too large")
    return [first.model_copy(update={"seed": first.seed + image}) for image in range(count)]


def _check_custom_id(custom_id: str, seen: set[str]) -> None:
    if custom_id in seen:
        raise columns.bad_cell("custom_id", "not_unique", "stands in an earlier row too")
    seen.add(custom_id)


def _in_row(number: int, problem: InputProblem) -> InputProblem:
    """The same problem, placed: the place says which row and column, the message only what."""
    return InputProblem(("row", number, *problem.loc), problem.code, problem.message)
