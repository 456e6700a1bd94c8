"""The router's response cache: its flags, its environment, and the Secrets that it needs. Pure."""

from typing import Any

from wherry_operator.api.kube import parse_duration
from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.response_cache import SemanticCache
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.access import NeededSecret, from_secret, redis_environment
from wherry_operator.desired.runtime import engine_config
from wherry_protocol import naming
from wherry_protocol.engine_config import fingerprint
from wherry_protocol.quantity import parse_quantity


def cache_args(owner: LLMDeployment, spec: LLMDeploymentSpec) -> list[str]:
    """The router's flags. The version changes with whatever may change an answer."""
    cache = spec.router.response_cache
    if cache is None:
        return []
    return [
        f"--response-cache-bytes={int(parse_quantity(cache.size))}",
        f"--response-cache-ttl-s={parse_duration(cache.ttl):g}",
        f"--response-cache-version={fingerprint(engine_config(spec))}",
        *([f"--response-cache-namespace={owner.namespace}/{owner.name}"] if cache.redis else []),
        *(_semantic_args(cache.semantic) if cache.semantic else []),
    ]


def _semantic_args(semantic: SemanticCache) -> list[str]:
    return [
        f"--embedding-url={semantic.url}",
        *([f"--embedding-model={semantic.model}"] if semantic.model else []),
        f"--embedding-timeout-s={parse_duration(semantic.timeout):g}",
        f"--similarity-threshold={semantic.similarity_threshold:g}",
        f"--similarity-questions={semantic.max_questions}",
        f"--similarity-max-chars={semantic.max_chars}",
    ]


def cache_environment(spec: LLMDeploymentSpec) -> list[dict[str, Any]]:
    """Redis' URL and the embedding endpoint's key."""
    cache = spec.router.response_cache
    if cache is None:
        return []
    found = redis_environment(naming.ENV_CACHE_REDIS_URL, cache.redis)
    if cache.semantic and cache.semantic.secret_name:
        found.append(from_secret(naming.ENV_EMBEDDING_KEY, cache.semantic.secret_name, "key"))
    return found


def cache_secrets(spec: LLMDeploymentSpec) -> list[NeededSecret]:
    """The Secrets that somebody else has to make."""
    cache, found = spec.router.response_cache, []
    if cache and cache.redis and cache.redis.secret_name:
        found.append(NeededSecret("spec.router.responseCache.redis", cache.redis.secret_name, ("url",)))
    if cache and cache.semantic and cache.semantic.secret_name:
        found.append(NeededSecret("spec.router.responseCache.semantic", cache.semantic.secret_name, ("key",)))
    return found
