"""Requests and answers of the API as pydantic models; the OpenAPI document is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _whole(value: Any) -> Any:
    """3.0 is an integer to JSON Schema, as 3 is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: Any) -> Any:
    """0 equals False to Python, but not to JSON."""
    if not isinstance(value, bool):
        raise ValueError("give true or false")
    return value


WHOLE = BeforeValidator(_whole)
No = Annotated[Literal[False], BeforeValidator(_boolean)]

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}$"

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
ModelName = Annotated[str, Field(min_length=1, max_length=64)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)]
Seconds = Annotated[float, Field(ge=0.001)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[int, Field(ge=1, le=1), WHOLE]
Empty = Annotated[dict[str, Any], Field(max_length=0)]
EmptyList = Annotated[list[Any], Field(max_length=0)]
Texts = Annotated[list[Text], Field(min_length=1)]


class Body(BaseModel):
    """A request: unknown fields, numbers as texts, NaN and infinity are errors; null is as left out."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, content: Any) -> Any:
        if isinstance(content, dict):
            return {name: value for name, value in content.items() if value is not None}
        return content


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: No | None = None


class Sampling(Body):
    """What completions and chats share; fields that only a neutral value is taken of are listed last."""

    model: ModelName
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="1 when left out; 0 is greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = Field(None, description="0: all tokens")
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Seconds | None = Field(None, description="Seconds until the answer is given up")
    user: str | None = Field(None, description="Taken and not used")
    safety_identifier: str | None = Field(None, description="Taken and not used")
    prompt_cache_key: str | None = Field(None, description="Taken and not used")
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Empty | None = None


class CompletionRequest(Sampling):
    """A text to continue, or several, as texts or token ids."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(
        None, description="Log-probabilities of the chosen token and of so many alternatives"
    )
    best_of: One | None = None
    echo: No | None = None
    suffix: Literal[""] | None = None


class TextPart(Body):
    """A piece of a message; other keys, such as ``cache_control``, say nothing about its text."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={})

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = Field(None, description="Taken and not used")


class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Annotated[str, Field(max_length=64)] | None = None
    cache_control: dict[str, Any] | None = Field(None, description="Taken and not used")
    # what an answer's own message has, which clients send back as it is
    refusal: None = None
    annotations: list[Any] | None = Field(None, description="As answers hold them; taken and not used")
    reasoning: str | None = Field(None, description="Taken and not used")
    reasoning_content: str | None = Field(None, description="Taken and not used")
    audio: None = None
    tool_calls: EmptyList | None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """A conversation to continue with the assistant's next turn."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(None, description="Needs logprobs: true")
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    store: No | None = None
    metadata: dict[str, Any] | None = Field(None, description="Taken and not used")
    service_tier: Literal["auto", "default"] | None = None


class GenerateRequest(Body):
    """Prompts and the runtime's own options; greedy unless ``do_sample``."""

    prompt: Text | Texts
    model: ModelName | None = Field(None, description="The first generating model when left out")
    max_new_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    min_new_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0.001, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    top_p: Annotated[float, Field(ge=0.0001, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] | None = None
    stop: Annotated[list[StopText], Field(max_length=16)] | None = None
    logprobs: bool | None = None
    stream: bool | None = None
    timeout: Seconds | None = None


class ClassifyRequest(Body):
    """Texts to label."""

    text: str | Annotated[list[str], Field(min_length=1)]
    model: ModelName | None = Field(None, description="The first classifier when left out")
    timeout: Seconds | None = None


class SwapRequest(Body):
    """Which configured folder a model shall be served from; its own, read again, when left out."""

    model: ModelName
    folder: ModelName | None = Field(None, description="A name among the configured `folders`, never a path")


# --- answers ----------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Safety(BaseModel):
    """What the guard's classifier says of an answer."""

    score: float = Field(description="Probability that it is bad")
    flagged: bool


class CompletionLogprobs(BaseModel):
    """Tokens of a completion, in parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = Field(
        None,
        description="By token, the chosen one always among them; of tokens with one text the later are `token_id:N`",
    )
    text_offset: list[int] = Field(description="Characters of the text before each token")


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None
    safety: Safety | None = None


class Completion(BaseModel):
    """The answer to a completion request, or one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="sha256 of the model folder's manifest")
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopToken(BaseModel):
    """A token that might have been chosen."""

    token: str = Field(description="Its text; of bytes that are no characters by themselves `bytes:\\xf0\\x9f`")
    logprob: float
    bytes: list[int]


class ChosenToken(TopToken):
    """One token of a chat answer."""

    top_logprobs: list[TopToken] = []


class ChatLogprobs(BaseModel):
    """Tokens of a chat answer."""

    content: list[ChosenToken]


class AssistantMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class ChatChoice(BaseModel):
    """One assistant's turn."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"]
    safety: Safety | None = None


class ChatCompletion(BaseModel):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="sha256 of the model folder's manifest")
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "yunque"
    kind: Literal["seq2seq", "causal", "classifier"]
    manifest_sha256: str


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class GeneratedAnswer(BaseModel):
    """One text of ``/generate``."""

    index: int
    text: str
    tokens: int
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: list[float] | None = None
    safety: Safety | None = None


class Generated(BaseModel):
    """The answer of ``/generate``."""

    model: str
    manifest_sha256: str
    answers: list[GeneratedAnswer]
    usage: Usage


class TextLabels(BaseModel):
    """One text's probabilities."""

    label: str
    probabilities: dict[str, float]


class Classified(BaseModel):
    """The answer of ``/classify``."""

    model: str
    manifest_sha256: str
    results: list[TextLabels]


class Swapped(BaseModel):
    """What a model is served from after a swap."""

    model: str
    manifest_sha256: str


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok", "ready", "loading", "draining"]


class ErrorDetail(BaseModel):
    """What is wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail
