"""From the step loop's progress to the events of one answer: text, stop strings, log-probabilities, metrics."""

import time
from collections.abc import Iterator

from wherry_protocol.worker import End, ErrorEvent, Event, FinishReason, Metrics, PositionLogprobs, Started, Token
from wherry_protocol.worker import TokenLogprob as Logprob
from wherry_runtime.engine.live import Live, Progress, RawLogprobs
from wherry_runtime.tokenization.detokenizer import Detokenizer
from wherry_runtime.tokenization.tokenizer import Tokenizer


class Answer:
    """One answer in the making. Runs on the event loop, off the step loop's hot path."""

    def __init__(
        self,
        request_id: str,
        live: Live,
        tokenizer: Tokenizer,
        detokenizer: Detokenizer,
        prompt_digest: str,
        version: str,
    ) -> None:
        self.ended = False
        self.needs_cancel = True  # until the engine itself has ended the request
        self._request_id = request_id
        self._live = live
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._num_prompt = live.request.num_prompt
        self._num_tokens = live.request.num_new  # more than none if another worker began the answer
        self._cached_tokens = 0
        self._prompt_digest = prompt_digest
        self._version = version

    def over(self, finish: FinishReason, reason: str | int | None) -> Iterator[Event]:
        """All events of an answer that the tokens of another worker had ended: their text has been told there."""
        self.needs_cancel = False
        yield self._start(0)
        yield from self._close(finish, reason)

    def take(self, progress: list[Progress]) -> Iterator[Event]:
        """The events for what has come. Tokens that came together go out as one event."""
        token = Token(index=self._num_tokens, ids=[])
        for item in progress:
            if item.admitted:
                yield self._start(item.cached_tokens)
            if item.token is not None:
                self._add(token, item)
            matched = self._detokenizer.matched
            if item.finish is not None or item.error is not None:
                self.needs_cancel = False
            if item.error is not None:
                yield from self._fail(token, item.error)
            elif matched is not None:
                yield from self._end(token, "stop", matched)
            elif item.finish is not None:
                yield from self._end(token, item.finish, item.stop_id)
            if self.ended:
                return
        if token.ids:
            yield token

    def _start(self, cached_tokens: int) -> Started:
        self._cached_tokens = min(cached_tokens, self._num_prompt)  # of a resumed answer, more may have been cached
        return Started(
            id=self._request_id,
            prompt_tokens=self._num_prompt,
            cached_tokens=self._cached_tokens,
            seed=self._live.seed,
            prompt_digest=self._prompt_digest,
            version=self._version,
        )

    def _add(self, token: Token, item: Progress) -> None:
        if item.token is None:
            return
        self._num_tokens += 1
        token.ids.append(item.token)
        if item.logprobs is not None:
            token.logprobs.append(self._logprobs(item.token, item.logprobs))
        if item.stop_id is None:  # a stop token is no part of the text
            token.text += self._detokenizer.push(item.token, may_stop=self._num_tokens >= self._live.params.min_tokens)

    def _end(self, token: Token, finish: FinishReason, reason: str | int | None) -> Iterator[Event]:
        token.text += self._detokenizer.finish()
        if self._detokenizer.matched is not None and finish != "cancelled":
            finish, reason = "stop", self._detokenizer.matched
        if token.ids or token.text:
            yield token
        yield from self._close(finish, reason)

    def _close(self, finish: FinishReason, reason: str | int | None) -> Iterator[Event]:
        now = time.monotonic()
        admitted = self._live.admitted or now
        first = self._live.first_token or now
        self.ended = True
        yield Metrics(queue_s=admitted - self._live.created, prefill_s=first - admitted, decode_s=now - first)
        yield End(
            finish_reason=finish,
            prompt_tokens=self._num_prompt,
            completion_tokens=self._num_tokens,
            cached_tokens=self._cached_tokens,
            stop_reason=reason,
        )

    def _fail(self, token: Token, error: ErrorEvent) -> Iterator[Event]:
        if token.ids:
            yield token
        self.ended = True
        yield error

    def _logprobs(self, token: int, raw: RawLogprobs) -> PositionLogprobs:
        return PositionLogprobs(
            sampled=self._logprob(token, raw.sampled),
            top=[self._logprob(t, p) for t, p in zip(raw.top_ids, raw.top, strict=True)],
        )

    def _logprob(self, token: int, value: float) -> Logprob:
        content = self._tokenizer.token_bytes(token)
        return Logprob(id=token, logprob=value, text=content.decode(errors="replace"), bytes=list(content))
