"""`wherry eval`: how good a model's predictions are, and what quantization changed."""

import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from wherry_cli.engine_flags import with_engine_flags
from wherry_cli.serve import Failure, model_uri
from wherry_protocol.engine_config import WORKER_ONLY

app = typer.Typer(help="Measure a model's quality on a text.", no_args_is_help=True, add_completion=False)

# Settings of a server, and those that are no matter of quality or are the same in all of them.
NOT_FLAGS = (
    *("model_name", "model_uri", "host", "port", "drain_timeout_s", "max_queued", "max_running", "max_batched_tokens"),
    *("max_itl_ratio", "max_model_len", "kv_cache_bytes", "prefix_cache", "speculative", "draft_model_uri"),
    *("max_draft_tokens", "tensor_parallel", "ranks_per_pod", *WORKER_ONLY),
)
Model = Annotated[str, typer.Argument(help="A model's directory, or sample://tiny.")]
Text = Annotated[Path, typer.Option(help="A text in UTF-8 that the model was not trained or calibrated on.")]
Windows = Annotated[int, typer.Option(help="Windows of the text that are measured.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens in a window; each is read by itself.", min=16)]
Json = Annotated[Path | None, typer.Option(help="Write the figures to this file.")]
Reference = Annotated[
    str, typer.Option(help="The model to compare with; default: the same one, not quantized while it is loaded.")
]


@app.callback()
def quality() -> None:
    """Measure a model's quality on a text, as the engine computes it: kernels, formats and KV cache included."""


@app.command("perplexity")
@with_engine_flags(*NOT_FLAGS)
def perplexity(
    model: Model, text: Text, windows: Windows = 24, length: Length = 1024, json: Json = None, **settings: Any
) -> None:
    """Perplexity: how many equally likely tokens the model seems to choose from. Lower is better."""

    def measure(runs: Any) -> dict[str, Any]:
        return {"model": runs.row(runs.perplexity(model, settings))}

    _run("perplexity", text, windows, length, json, measure)


@app.command("kl")
@with_engine_flags(*NOT_FLAGS)
def kl(
    model: Model,
    text: Text,
    reference: Reference = "",
    windows: Windows = 24,
    length: Length = 1024,
    json: Json = None,
    **settings: Any,
) -> None:
    """Divergence from a reference: mean Kullback-Leibler divergence in nats per token, agreement of the likeliest
    token, and both perplexities. It sees what perplexity hardly does: rounding raises some probabilities and lowers
    others."""

    def measure(runs: Any) -> dict[str, Any]:
        ours, theirs = runs.compare(model, reference or model, settings)
        return {"reference": runs.row(theirs), "model": runs.row(ours)}

    _run("kl", text, windows, length, json, measure)


@app.command("tokens")
@with_engine_flags(*NOT_FLAGS)
def tokens(
    model: Model,
    text: Text,
    reference: Reference = "",
    windows: Windows = 24,
    length: Length = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 64,
    json: Json = None,
    **settings: Any,
) -> None:
    """Greedy answers beside a reference's: how many are the same to the end, and how far they are the same. Each is the
    answer to a window's beginning, which the new tokens fill up to its length."""

    def measure(runs: Any) -> dict[str, Any]:
        return {"model": runs.answers(model, reference or model, new_tokens, settings)}

    if new_tokens >= length:
        raise typer.BadParameter(f"must be less than --length, {length}", param_hint="--new-tokens")
    _run("tokens", text, windows, length, json, measure)


def _run(
    name: str, text: Path, windows: int, length: int, json: Path | None, measure: Callable[[Any], dict[str, Any]]
) -> None:
    from wherry_cli.eval_runs import Runs, show  # the engine takes seconds to import
    from wherry_runtime.loading.errors import ModelError

    try:
        found = measure(Runs(text, windows, length, model_uri))
        if json:
            json.write_text(json_module.dumps({"text": text.name, "length": length, **found}, indent=1) + "\n")
    except (Failure, ModelError, OSError) as error:
        sys.stderr.write(f"wherry eval {name}: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    show(found)
