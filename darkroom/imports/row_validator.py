"""The rows of a file into jobs, or into everything that is wrong with them. Pure."""

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
from darkroom.imports.columns import RowInput, Style
from darkroom.imports.expansion import variants
from darkroom.imports.records import Record
from darkroom.jobs.bulk_insert import JobTemplate, NewJob
from darkroom.status import Expand, Priority
from darkroom.webhooks import endpoints
from darkroom.webhooks.url_policy import UrlPolicy

MAX_JOBS_PER_ROW: Final = 10_000
_MAX_RECIPES: Final = 1_000  #: remembered at once
#: fields that the query may set for all rows; what it says by these names is said of the batch
DEFAULTS: Final = tuple(
    sorted(
        RowInput.model_fields.keys()
        - {"prompt", "custom_id", "label", "webhook_url", "webhook_events"}
    )
)


class PerRowFields(TypedDict, total=False):
    """The fields that a row seldom shares with another, under `RowInput`'s rules."""

    __pydantic_config__ = RowInput.model_config  # type: ignore[misc]  # pydantic's documented way
    prompt: Required[Prompt]
    negative_prompt: LongText
    seed: Seed | None
    custom_id: Label | None


_WORDS: Final = frozenset(PerRowFields.__annotations__)
_validate_fields: Final = TypeAdapter(PerRowFields).validate_python


@dataclass(frozen=True)
class ImportOptions:
    """What all rows of a file have in common."""

    registry: ModelRegistry
    policy: UrlPolicy  #: of the URLs that webhooks may go to
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
        raise columns.bad_cell(name, "duplicate_parameter", "is given twice")
    return column


class RowValidator:
    """Judges the rows of one file, in order.

    What a row shares with others, which is all but its own words, is judged when it is first met;
    from then on only the words are. What is wrong with either is told by the first way, in full.
    """

    def __init__(self, plan: ImportOptions) -> None:
        self._plan = plan
        self._defaults = plan.defaults
        self._custom_ids: set[str] = set()  #: of the rows so far
        self._recipes: dict[str, JobTemplate] = {}  #: by the fields they were made of

    def __call__(self, record: Record) -> list[NewJob]:
        """The row's jobs, in order. Raises InvalidInput with all that is wrong with it."""
        problems = record.problems
        if record.values is not None:
            try:
                values = {**self._defaults, **record.values} if self._defaults else record.values
                drafts = self._drafts(record.number, values)
            except ValidationError as error:
                problems = _joined(problems, input_problems(error))
            except InvalidInput as error:
                problems = _joined(problems, error.problems)
            else:
                if not problems:
                    return drafts
        raise InvalidInput([_in_row(record.number, problem) for problem in problems])

    def _drafts(self, number: int, values: dict[str, object]) -> list[NewJob]:
        self._note_custom_id(values.get("custom_id"))
        if self._plan.expand is None:
            return _images(number, 0, *self._judged(values))
        if values.get("seed") is None:  # one for all, so that only what is swept differs
            values["seed"] = random_seed()
        made: list[NewJob] = []
        for variant in variants(values, self._plan.expand):
            made += _images(number, len(made), *self._judged(variant))
            if len(made) > MAX_JOBS_PER_ROW:
                message = f"makes more than {MAX_JOBS_PER_ROW:,} jobs of one row"
                raise columns.bad_cell("num_images", "too_many_jobs", message)
        return made

    def _note_custom_id(self, custom_id: object) -> None:
        if isinstance(custom_id, str):
            if custom_id in self._custom_ids:
                raise columns.bad_cell("custom_id", "not_unique", "stands in an earlier row too")
            self._custom_ids.add(custom_id)

    def _judged(self, values: dict[str, object]) -> tuple[JobTemplate, PerRowFields]:
        words: dict[str, object] = {}
        others: list[object] = []
        for name, value in values.items():
            if name in _WORDS:
                words[name] = value
            else:
                others += (name, value)
        shared = repr(others)  # as text, because 1, 1.0 and True are the same key, lists are none
        recipe = self._recipes.get(shared)
        if recipe is not None:
            try:
                return recipe, _validate_fields(words)
            except ValidationError:
                pass  # is told with all else that is wrong
        job = RowInput.model_validate(values)
        if len(self._recipes) == _MAX_RECIPES:
            self._recipes.clear()
        recipe = self._recipes[shared] = self._recipe(job)
        return recipe, _validate_fields(words)

    def _recipe(self, job: RowInput) -> JobTemplate:
        if job.webhook_url is not None:
            endpoints.check_own_url(job.webhook_url, self._plan.policy)
        params = self._plan.registry.resolve(job)
        key = self._plan.registry.models[params.model].microbatch_key(params)
        return JobTemplate.of(job, params, key, default=Priority.BULK, num_images=job.num_images)


def _images(number: int, first: int, recipe: JobTemplate, words: PerRowFields) -> list[NewJob]:
    """`num_images` pictures of one row: the same but for seeds that count up."""
    prompt, negative_prompt = words["prompt"], words.get("negative_prompt", "")
    custom_id, seed = words.get("custom_id"), words.get("seed")
    if seed is None:
        seed = random_seed()
    if seed + recipe.num_images - 1 > MAX_SEED:
        raise columns.bad_cell("seed", "out_of_range", "seed + num_images is too large")
    if recipe.num_images == 1:
        return [NewJob(recipe, prompt, negative_prompt, seed, number, first, custom_id)]
    return [
        NewJob(recipe, prompt, negative_prompt, seed + image, number, first + image, custom_id)
        for image in range(recipe.num_images)
    ]


def _joined(cells: list[InputProblem], fields: list[InputProblem]) -> list[InputProblem]:
    """Of a cell that could not be read it need not be said that its field is missing."""
    known = {problem.loc for problem in cells}
    return cells + [problem for problem in fields if problem.loc[:1] not in known]


def _in_row(number: int, problem: InputProblem) -> InputProblem:
    """The same problem, placed: the place says which row and column, the message only what."""
    return InputProblem(("row", number, *problem.loc), problem.code, problem.message)
