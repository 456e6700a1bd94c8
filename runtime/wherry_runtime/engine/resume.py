"""An answer that another worker began: is it one, and what state of its text does it leave?

Sampling is a function of (seed, position) and of the tokens so far, and text is a function of the tokens. So the tokens
are all that a worker needs to go on as if it had drawn them itself.
"""

import hashlib
from typing import NoReturn

import numpy as np

from wherry_protocol.worker import FinishReason, Resume, SamplingParams
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.validation import RequestError, check_token_id
from wherry_runtime.tokenization.detokenizer import Detokenizer

DIGEST_BYTES = 8


def _refuse(message: str) -> NoReturn:
    raise RequestError("invalid_resume", message, param="resume")


def digest_of(tokens: list[int]) -> str:
    """A short name for a prompt's tokens, the same on every worker."""
    return hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=DIGEST_BYTES).hexdigest()


def check_resume(resume: Resume, params: SamplingParams, digest: str, vocab_size: int) -> None:
    """Raises RequestError (invalid_resume) unless it can be an answer to this prompt, whose digest is `digest`."""
    if not isinstance(resume.seed, int) or isinstance(resume.seed, bool) or not -(1 << 63) <= resume.seed < 1 << 64:
        _refuse("resume.seed must be an integer of 64 bits")
    if params.seed is not None and params.seed != resume.seed:
        _refuse(f"resume.seed is {resume.seed} and the request's own seed is {params.seed}")
    if resume.prompt_digest not in ("", digest):
        _refuse(
            "this worker makes other tokens of the prompt than the one that began the answer (another tokenizer or "
            "chat template), so it cannot continue it"
        )
    if params.max_tokens is not None and len(resume.token_ids) > params.max_tokens:
        _refuse(f"resume has {len(resume.token_ids)} tokens and max_tokens is {params.max_tokens}")
    for token in resume.token_ids:
        check_token_id(token, vocab_size, code="invalid_resume", param="resume")


def recall(live: Live, detokenizer: Detokenizer) -> tuple[FinishReason, int | str | None] | None:
    """Brings `detokenizer` to where the tokens that `live` resumes leave it.

    Returns:
        Finish and stop reason if the last of these tokens ended the answer; None if it goes on.

    Raises:
        RequestError: invalid_resume, if the answer had ended before the last token.
    """
    request = live.request
    tokens = request.tokens[request.num_prompt :]
    for count, token in enumerate(tokens, 1):
        finish = live.finish_after(token, count)
        if finish != "stop":  # a stop token is no part of the text
            detokenizer.push(token, may_stop=count >= live.params.min_tokens)
        if finish is None and detokenizer.matched is None:
            continue
        if count < len(tokens):
            _refuse(f"the answer ended with token {count} of the {len(tokens)} to be resumed")
        if finish != "stop":
            detokenizer.finish()
        if detokenizer.matched is not None:
            return "stop", detokenizer.matched
        return ("stop", token) if finish == "stop" else ("length", None)
    return None
