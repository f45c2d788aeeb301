"""What a client asks for, and what the engine is told: diffusers' parameter names throughout."""

import random
import re
from typing import Annotated, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from darkroom.event_types import JOB_ENDS, OF_JOBS, EventType
from darkroom.status import OutputFormat, Priority

MAX_PROMPT_CHARS: Final = 2000
MAX_SEED: Final = 2**53 - 1  #: the largest integer that JSON readers keep exactly
MAX_DEADLINE_S: Final = 30 * 24 * 3600
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # not \t, \n
_SEED_BITS: Final = 32  # short enough to read out; clients may send larger ones


def _printable(text: str) -> str:
    """Refuse what PostgreSQL, logs or PNG text cannot carry: NUL, controls, surrogates."""
    found = None if text.isprintable() else _UNPRINTABLE.search(text)  # the first is cheaper
    if found:
        raise PydanticCustomError(
            "control_character",
            "contains the character U+{code}, which is not allowed",
            {"code": f"{ord(found[0]):04X}"},
        )
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must not be empty")
    return text


_PRINTABLE: Final = AfterValidator(_printable)
LongText = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), _PRINTABLE]
Prompt = Annotated[LongText, AfterValidator(_not_blank)]
WebhookUrl = Annotated[str, Field(min_length=1, max_length=2048), _PRINTABLE]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Label = Annotated[str, Field(min_length=1, max_length=200), _PRINTABLE]


def _of_jobs(kinds: list[EventType]) -> list[EventType]:
    if strange := set(kinds) - set(OF_JOBS):
        raise PydanticCustomError(
            "not_a_job_event", "does not happen to a job: {kinds}", {"kinds": ", ".join(strange)}
        )
    return sorted(set(kinds))


class JobInput(BaseModel):
    """One picture as the client asks for it. What is left out comes from the model's defaults."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    prompt: Prompt = Field(description="What to draw, 1 to 2000 characters.")
    negative_prompt: LongText = Field("", description="What to keep out of the picture.")
    model: Label | None = Field(
        None, description="A model's name, from GET /v1/models, or NAME@REVISION."
    )
    width: int | None = Field(None, description="Pixels; limits per model.")
    height: int | None = Field(None, description="Pixels; limits per model.")
    num_inference_steps: int | None = Field(None, description="Denoise steps; limits per model.")
    guidance_scale: float | None = Field(
        None, description="Classifier-free guidance; 1 or less turns it off, and costs half."
    )
    seed: Seed | None = Field(None, description="Same seed, same picture. Drawn when left out.")
    output_format: Annotated[OutputFormat, Field(strict=False)] = Field(
        OutputFormat.PNG, description="How the image is encoded."
    )
    priority: Annotated[Priority, Field(strict=False)] | None = Field(
        None, description="Default: normal for a single job, bulk for a batch's rows."
    )
    start_within_s: int | None = Field(
        None, ge=1, le=MAX_DEADLINE_S, description="Seconds; not begun by then, it expires."
    )
    deadline_s: int | None = Field(
        None, ge=1, le=MAX_DEADLINE_S, description="Seconds; not finished by then, it expires."
    )
    label: Label | None = Field(None, description="Yours, to find the job again.")
    metadata: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=64), _PRINTABLE],
            Annotated[str, Field(max_length=512), _PRINTABLE],
        ],
        Field(max_length=16),
    ] = Field(default_factory=dict, description="Yours: up to 16 pairs of strings.")
    webhook_url: WebhookUrl | None = Field(
        None,
        description="POSTed to when it ends, signed with the secret of GET /v1/webhook-secret.",
    )
    webhook_events: (
        Annotated[
            list[Annotated[EventType, Field(strict=False)]],
            Field(min_length=1, max_length=len(OF_JOBS)),
            AfterValidator(_of_jobs),
        ]
        | None
    ) = Field(None, description=f"Default: {', '.join(JOB_ENDS)}. Needs `webhook_url`.")

    @model_validator(mode="after")
    def _events_need_a_url(self) -> Self:
        if self.webhook_events is not None and self.webhook_url is None:
            raise PydanticCustomError("missing_field", "webhook_events needs a webhook_url")
        return self

    @property
    def webhook_event_types(self) -> list[str] | None:
        """What its URL is told, if it has one."""
        if self.webhook_url is None:
            return None
        return [*(self.webhook_events or JOB_ENDS)]


class GenerationParams(BaseModel):
    """Everything that decides the picture, with nothing left open."""

    model_config = ConfigDict(frozen=True, from_attributes=True, protected_namespaces=())

    prompt: str
    negative_prompt: str
    model: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    output_format: OutputFormat


def cost(params: GenerationParams) -> float:
    """What drawing it takes, in passes of the UNet over one row of 512 by 512 pixels."""
    passes = 2 if params.guidance_scale > 1 else 1  # with guidance also the negative prompt's
    return params.num_inference_steps * passes * params.width * params.height / 512**2


def random_seed() -> int:
    """A seed for a client that named none; stored with the job, so that it can be drawn again."""
    return random.getrandbits(_SEED_BITS)  # no secret; and no system call


def microbatch_key(*, model: str, revision: str, width: int, height: int, precision: str) -> str:
    """What must be equal for jobs to share one UNet batch; all else varies from row to row."""
    return f"{model}@{revision}/{width}x{height}/{precision}"


def revision_in(key: str) -> str:
    """The weights' revision that a microbatch key names."""
    return key.partition("@")[2].partition("/")[0]
