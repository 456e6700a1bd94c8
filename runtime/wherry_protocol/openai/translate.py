"""From a client's request to the worker's: one `ExecuteRequest` for each choice of the answer."""

from wherry_protocol.openai.requests import ChatCompletionRequest, Request
from wherry_protocol.worker import ChatMessage, ExecuteRequest, Prompt, SamplingParams

_SEED_MASK = 2**63 - 1


def to_execute(request: Request, answer_id: str, created: int = 0, cache_salt: str = "") -> list[ExecuteRequest]:
    """The generations that `request` asks for, in the order of the answer's choices.

    `n` choices of a prompt get seeds that follow one another, so a seeded request with n > 1 has distinct choices and
    the first of them is the answer of the same request with n = 1. `created` (Unix seconds) is the time of all of them:
    a prompt that names the day is the same on every worker. `cache_salt`: see `ExecuteRequest`.
    """
    prompts = _prompts(request)
    n = request.n or 1
    return [
        ExecuteRequest(
            id=f"{answer_id}-{index}",
            model=request.model,
            prompt=prompts[index // n],
            sampling=_sampling(request, index % n),
            created=created,
            cache_salt=cache_salt,
        )
        for index in range(len(prompts) * n)
    ]


def _prompts(request: Request) -> list[Prompt]:
    if isinstance(request, ChatCompletionRequest):
        turns = [ChatMessage(role=turn.role, content=turn.content or "", name=turn.name) for turn in request.messages]
        return [Prompt(messages=turns)]
    return [Prompt(text=p) if isinstance(p, str) else Prompt(token_ids=p) for p in request.prompt]


def _logprobs(request: Request) -> int | None:
    if isinstance(request, ChatCompletionRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def _sampling(r: Request, choice: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=r.limit(),
        min_tokens=r.min_tokens or 0,
        temperature=1.0 if r.temperature is None else r.temperature,
        top_k=max(r.top_k or 0, 0),
        top_p=1.0 if r.top_p is None else r.top_p,
        min_p=r.min_p or 0.0,
        presence_penalty=r.presence_penalty or 0.0,
        frequency_penalty=r.frequency_penalty or 0.0,
        repetition_penalty=1.0 if r.repetition_penalty is None else r.repetition_penalty,
        seed=None if r.seed is None else (r.seed + choice) & _SEED_MASK,
        stop=r.stop,
        stop_token_ids=r.stop_token_ids or [],
        ignore_eos=bool(r.ignore_eos),
        logit_bias=r.logit_bias,
        logprobs=_logprobs(r),
    )
