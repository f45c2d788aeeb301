"""Job input as clients send it, and generation parameters, by diffusers' names."""

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
    """Reject what PostgreSQL, logs or PNG text cannot carry: NUL, controls, surrogates."""
    match = None if text.isprintable() else _UNPRINTABLE.search(text)  # isprintable is cheaper
    if match:
        raise PydanticCustomError(
            "control_character",
            "contains the character U+{code}, which is not allowed",
            {"code": f"{ord(match[0]):04X}"},
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
    if others := set(kinds) - set(OF_JOBS):
        raise PydanticCustomError(
            "not_a_job_event", "not an event of a job: {kinds}", {"kinds": ", ".join(others)}
        )
    return sorted(set(kinds))


class JobInput(BaseModel):
    """Input for one image. Fields that are left out get the model's defaults."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    prompt: Prompt = Field(description="What to generate, 1 to 2000 characters.")
    negative_prompt: LongText = Field(
        "", description="What to keep out of the image, up to 2000 characters. Default: empty."
    )
    model: Label | None = Field(
        None,
        description="Name of a model from GET /v1/models, or NAME@REVISION. Default: the server's.",
    )
    width: int | None = Field(None, description="Pixels. Limits and default depend on the model.")
    height: int | None = Field(None, description="Pixels. Limits and default depend on the model.")
    num_inference_steps: int | None = Field(
        None, description="Denoise steps. Limits and default depend on the model."
    )
    guidance_scale: float | None = Field(
        None,
        description="Classifier-free guidance. 1 or less turns it off and halves the cost. "
        "Default: the model's.",
    )
    seed: Seed | None = Field(
        None,
        description="Random seed. The same seed and parameters give the same image. "
        "Default: random.",
    )
    output_format: Annotated[OutputFormat, Field(strict=False)] = Field(
        OutputFormat.PNG, description="Encoding of the image. Default: png."
    )
    priority: Annotated[Priority, Field(strict=False)] | None = Field(
        None,
        description="Priority class. Default: normal for a single job, bulk for a row of a batch.",
    )
    start_within_s: int | None = Field(
        None,
        ge=1,
        le=MAX_DEADLINE_S,
        description="Seconds after submission by which generation must start; otherwise the job "
        "expires.",
    )
    deadline_s: int | None = Field(
        None,
        ge=1,
        le=MAX_DEADLINE_S,
        description="Seconds after submission by which the job must finish; otherwise it expires.",
    )
    label: Label | None = Field(
        None, description="Your own label, returned with the job and usable as a list filter."
    )
    metadata: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=64), _PRINTABLE],
            Annotated[str, Field(max_length=512), _PRINTABLE],
        ],
        Field(max_length=16),
    ] = Field(
        default_factory=dict,
        description="Your own data, returned with the job: up to 16 pairs of strings.",
    )
    webhook_url: WebhookUrl | None = Field(
        None,
        description="URL that receives a POST when the job finishes, signed with the secret of "
        "GET /v1/webhook-secret.",
    )
    webhook_events: (
        Annotated[
            list[Annotated[EventType, Field(strict=False)]],
            Field(min_length=1, max_length=len(OF_JOBS)),
            AfterValidator(_of_jobs),
        ]
        | None
    ) = Field(
        None, description=f"Events to send; needs `webhook_url`. Default: {', '.join(JOB_ENDS)}."
    )

    @model_validator(mode="after")
    def _events_need_a_url(self) -> Self:
        if self.webhook_events is not None and self.webhook_url is None:
            raise PydanticCustomError("missing_field", "webhook_events needs a webhook_url")
        return self

    @property
    def webhook_event_types(self) -> list[str] | None:
        """Event types that are sent to the job's own URL; None without one."""
        if self.webhook_url is None:
            return None
        return [*(self.webhook_events or JOB_ENDS)]


class GenerationParams(BaseModel):
    """Complete parameters of one image."""

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
    """Return the cost of generation, in UNet passes over one row of 512 by 512 pixels."""
    passes = 2 if params.guidance_scale > 1 else 1  # with guidance, one for the negative prompt
    return params.num_inference_steps * passes * params.width * params.height / 512**2


def random_seed() -> int:
    """Return a seed for a job that names none; it is stored, so that the image is reproducible."""
    return random.getrandbits(_SEED_BITS)  # not a secret; needs no system call


def microbatch_key(*, model: str, revision: str, width: int, height: int, precision: str) -> str:
    """Return what must be equal for jobs to share one UNet batch; all else may differ by row."""
    return f"{model}@{revision}/{width}x{height}/{precision}"


def model_of(key: str) -> str:
    """Return the name of the model in a microbatch key."""
    return key.partition("@")[0]


def revision_in(key: str) -> str:
    """Return the weights' revision in a microbatch key."""
    return key.partition("@")[2].partition("/")[0]
