"""The part of an LLMDeployment that says who may use its router, how much, and what is encrypted how."""

from typing import Literal

from pydantic import Field

from wherry_operator.api import rules
from wherry_operator.api.kube import CamelModel

NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class Oidc(CamelModel):
    """An OIDC issuer whose tokens (JWT) are taken."""

    issuer: str = Field(
        description="URL of the issuer, as tokens name it in `iss`.", pattern=r"^https?://[^\s]+$", max_length=1024
    )
    audience: str = Field(description="What tokens must have in `aud`.", pattern=r"^[^\s]+$", max_length=256)
    tenant_claim: str = Field(
        "sub", description="The claim that names a token's tenant.", pattern=r"^[^\s]+$", max_length=256
    )


class RouterAuth(CamelModel):
    """Who may use the router. Without it: whoever reaches it. With both, a key or a token will do."""

    secret_name: str | None = Field(
        None,
        description="A Secret of this namespace with API keys, one in each entry; `wherry keys new` makes them. "
        "Changes are followed without a restart.",
        pattern=NAME,
        max_length=253,
    )
    oidc: Oidc | None = Field(None, description="An issuer whose tokens are taken.")


class LimitSet(CamelModel):
    """How much may be asked for. What is left out has no limit."""

    requests_per_minute: int | None = Field(None, description="Requests in any 60 s.", ge=1, le=10_000_000)
    tokens_per_minute: int | None = Field(
        None, description="Tokens of prompts and answers in any 60 s.", ge=1, le=1_000_000_000_000
    )
    concurrent: int | None = Field(None, description="Requests at a time.", ge=1, le=1_000_000)


class RedisAt(CamelModel):
    """A Redis or Valkey."""

    url: str | None = Field(
        None,
        description="Its URL, redis://HOST:PORT/DB or rediss://…, without a password.",
        pattern=r"^rediss?://[^\s@]+$",
        max_length=1024,
    )
    secret_name: str | None = Field(
        None,
        description="A Secret of this namespace whose entry `url` is the URL, where that holds a password.",
        pattern=NAME,
        max_length=253,
    )


class Redis(RedisAt):
    """A Redis or Valkey in which all routers count together."""

    fallback: Literal["local", "open", "closed"] = Field(
        "local",
        description="What holds while it is lost: each router its part of the limits, no limits, or no requests (503).",
    )


class RouterLimits(CamelModel):
    """How much clients may ask for."""

    per_key: LimitSet | None = Field(None, description="Of each API key or token that has no limits of its own.")
    per_tenant: LimitSet | None = Field(None, description="Of each tenant, all its keys together.")
    total: LimitSet | None = Field(None, description="Of all requests together.")
    redis: Redis | None = Field(
        None,
        description="Where the routers count together. Without it each has its part of every limit to itself.",
        json_schema_extra=rules.REDIS,
    )


class WorkerTls(CamelModel):
    """Mutual TLS between routers and workers."""

    secret_name: str = Field(
        description="A Secret of this namespace with `ca.crt`, `tls.crt` and `tls.key`, as cert-manager makes it. The "
        "certificate is shown by both ends, so its usages are server auth and client auth. A new one is used without a "
        "restart.",
        pattern=NAME,
        max_length=253,
    )
    server_name: str | None = Field(
        None,
        description="The DNS name in the certificate that says that a worker is one. Defaults to "
        "NAME-workers.NAMESPACE.svc, of this LLMDeployment.",
        pattern=NAME,
        max_length=253,
    )


class RouterTls(CamelModel):
    """TLS on the router's port."""

    secret_name: str = Field(
        description="A Secret of this namespace of type kubernetes.io/tls: certificate chain in `tls.crt`, key in "
        "`tls.key`. A new certificate is used without a restart.",
        pattern=NAME,
        max_length=253,
    )
