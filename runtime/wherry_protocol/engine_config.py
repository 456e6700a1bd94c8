"""An engine's settings, as the operator writes them into container arguments and the runtime reads them back.

One declaration serves both, so that neither can name a flag that the other does not know.
"""

import argparse
import hashlib
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "int4"]
KVCacheDtype = Literal["auto", "float32", "bfloat16", "fp8", "int8"]


Backend = Literal["auto", "native", "pytorch"]
Speculative = Literal["none", "ngram", "draft", "auto"]


class EngineConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Each field is a flag: `max_running` is `--max-running`."""

    model_name: Annotated[str, msgspec.Meta(description="name that clients ask for")]
    model_uri: Annotated[
        str,
        msgspec.Meta(
            description="file:///dir, sample://tiny, a plain path, or what is downloaded: hf://ORG/NAME@REVISION, "
            "s3://BUCKET/PREFIX, https://HOST/FILE.gguf#sha256=HEX, oci://REGISTRY/REPOSITORY:TAG"
        ),
    ]
    host: Annotated[str, msgspec.Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(description="port to listen on; 0 picks a free one")] = 8000
    worker_tls: Annotated[
        str,
        msgspec.Meta(
            description="directory with ca.crt, tls.crt and tls.key: listen with mutual TLS, for clients with a "
            "certificate of ca.crt; followed as it changes"
        ),
    ] = ""
    worker_tls_name: Annotated[
        str, msgspec.Meta(description="the DNS name in tls.crt, which clients look for; needed with --worker-tls")
    ] = ""
    probe_port: Annotated[
        int, msgspec.Meta(description="port with nothing but /health and /ready, without TLS; 0: none")
    ] = 0
    dtype: Annotated[Dtype, msgspec.Meta(description="type of weights and activations")] = "auto"
    quantization: Annotated[
        Quantization, msgspec.Meta(description="round the matrices to int8 or int4 as they are loaded")
    ] = "none"
    quantization_group: Annotated[
        int, msgspec.Meta(description="weights that share a scale: 32, 64 or 128; 0: best for the quantization")
    ] = 0
    measure_quality: Annotated[
        bool, msgspec.Meta(description="measure what that costs, once the model is loaded, for /health to tell")
    ] = True
    weight_cache: Annotated[
        str, msgspec.Meta(description="directory that keeps packed weights, so that the next load is faster")
    ] = ""
    model_cache: Annotated[
        str,
        msgspec.Meta(
            description="directory of downloaded models, which processes may share; empty: $WHERRY_MODEL_CACHE, else "
            "~/.cache/wherry/models"
        ),
    ] = ""
    max_model_len: Annotated[
        int, msgspec.Meta(description="tokens of prompt and answer together; 0: the model's own")
    ] = 0
    max_running: Annotated[int, msgspec.Meta(description="requests in a batch at most")] = 64
    max_batched_tokens: Annotated[
        int, msgspec.Meta(description="tokens in one step at most; longer prompts are chunked")
    ] = 2048
    max_itl_ratio: Annotated[
        float,
        msgspec.Meta(
            description="how many times as long running answers may wait for a token while prompts come in, which are "
            "chunked accordingly; 0: no limit, for the highest throughput"
        ),
    ] = 2.0
    max_queued: Annotated[int, msgspec.Meta(description="requests that may wait; over it the answer is 429")] = 256
    kv_cache_dtype: Annotated[
        KVCacheDtype, msgspec.Meta(description="type of the KV cache; auto: that of the activations")
    ] = "auto"
    block_size: Annotated[int, msgspec.Meta(description="tokens in a KV cache block")] = 16
    kv_cache_bytes: Annotated[
        int, msgspec.Meta(description="memory for the KV cache; 0: sized from the memory limit")
    ] = 0
    prefix_cache: Annotated[bool, msgspec.Meta(description="reuse the KV cache of equal prefixes")] = True
    backend: Annotated[
        Backend,
        msgspec.Meta(description="what computes: our own kernels (native), PyTorch, or the faster one that can"),
    ] = "auto"
    speculative: Annotated[
        Speculative,
        msgspec.Meta(description="guess tokens by prompt lookup (ngram), a draft model, or both (auto)"),
    ] = "none"
    draft_model_uri: Annotated[
        str, msgspec.Meta(description="model that guesses, with the same tokenizer; for draft and auto")
    ] = ""
    max_draft_tokens: Annotated[int, msgspec.Meta(description="guesses per answer and step at most")] = 8
    threads: Annotated[int, msgspec.Meta(description="CPU threads; 0: what the cgroup allows")] = 0
    tensor_parallel: Annotated[int, msgspec.Meta(description="ranks that compute the model together")] = 1
    ranks_per_pod: Annotated[
        int, msgspec.Meta(description="ranks that this process and its children are; 0: all of them")
    ] = 0
    drain_timeout_s: Annotated[
        int, msgspec.Meta(description="seconds that running requests get to finish after SIGTERM")
    ] = 300


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# What a process that is no worker has no use for.
WORKER_ONLY = ("worker_tls", "worker_tls_name", "probe_port", "measure_quality")


def to_args(config: EngineConfig) -> list[str]:
    """Container arguments for `config`; settings at their default are left out."""
    args = []
    for field in msgspec.structs.fields(EngineConfig):
        value = getattr(config, field.name)
        if field.required or value != field.default:
            args.append(f"{_flag(field.name)}={str(value).lower() if isinstance(value, bool) else value}")
    return args


# What says where a worker is, not what it answers. A pod's address is in no spec.
_PLACE = (*WORKER_ONLY, "host", "port", "drain_timeout_s", "threads")


def fingerprint(config: EngineConfig) -> str:
    """Names what answers: the model and the settings that may change an answer. Equal in the spec and in its pods."""
    defaults = {f.name: f.default for f in msgspec.structs.fields(EngineConfig) if f.name in _PLACE}
    settings = " ".join(to_args(msgspec.structs.replace(config, **defaults)))
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def argument_parser(prog: str) -> argparse.ArgumentParser:
    """A parser with one flag for every field."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    hints = get_type_hints(EngineConfig, include_extras=True)
    for field in msgspec.structs.fields(EngineConfig):
        base, meta = get_args(hints[field.name])[:2]
        options: dict[str, Any] = {"help": f"{meta.description}", "required": field.required}
        if not field.required:
            options["default"] = field.default
            options["help"] += f" (default: {field.default})"
        if choices := get_args(base):
            options["choices"] = choices
        else:
            options["type"] = _boolean if base is bool else base
        parser.add_argument(_flag(field.name), **options)
    return parser


def from_args(argv: list[str], prog: str = "wherry-runtime") -> EngineConfig:
    """The settings that `argv` names; argparse exits with status 2 and a usage line when it cannot be read."""
    return EngineConfig(**vars(argument_parser(prog).parse_args(argv)))
