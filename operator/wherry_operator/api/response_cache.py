"""The part of an LLMDeployment that says which answers its routers keep, and where."""

from pydantic import Field

from wherry_operator.api import rules
from wherry_operator.api.access import NAME, RedisAt
from wherry_operator.api.kube import CamelModel, Duration, Quantity


class SemanticCache(CamelModel):
    """Answers a question with the kept answer of another one that means the same. That can be wrong: measure with your
    own questions before you trust it."""

    url: str = Field(
        description="Where texts become vectors: a URL that speaks OpenAI's /v1/embeddings, such as "
        "http://embeddings:8080/v1/embeddings.",
        pattern=r"^https?://[^\s@]+$",
        max_length=1024,
    )
    model: str = Field("", description="The model to name there.", pattern=r"^\S*$", max_length=256)
    secret_name: str | None = Field(
        None,
        description="A Secret of this namespace whose entry `key` is the API key to use there.",
        pattern=NAME,
        max_length=253,
    )
    similarity_threshold: float = Field(
        0.95,
        description="Cosine of two questions' vectors from which on they mean the same. It depends on the model.",
        ge=0.5,
        le=1,
    )
    max_questions: int = Field(
        2000,
        description="Answered questions that each router knows, of all tenants. One of 1,024 dimensions takes 4 KiB.",
        ge=1,
        le=20000,
    )
    max_chars: int = Field(
        1000,
        description="Longer questions are not compared. Keep it below what the embedding model reads at once.",
        ge=1,
        le=32000,
    )
    timeout: Duration = Field(
        "200ms",
        description="How long a request waits for its embedding before it is answered without.",
        json_schema_extra=rules.EMBEDDING_TIMEOUT,
    )


class ResponseCache(CamelModel):
    """Answers that are the same each time (temperature 0, or a seed) are kept, and told again from memory."""

    size: Quantity = Field(
        "256Mi",
        description="Memory for them: in each router, on top of what it needs itself, or in Redis for all routers "
        "together; 1Mi at least.",
        json_schema_extra=rules.CACHE_SIZE,
    )
    ttl: Duration = Field("10m", description="How long an answer is kept.", json_schema_extra=rules.CACHE_TTL)
    redis: RedisAt | None = Field(
        None,
        description="Where the routers keep answers together. Without it each keeps its own.",
        json_schema_extra=rules.CACHE_REDIS,
    )
    semantic: SemanticCache | None = Field(
        None, description="Also finds answers of questions that mean the same. Without it only of equal ones."
    )
