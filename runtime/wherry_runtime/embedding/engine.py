"""The engine of embedding models: the same surface as that of models that generate, and vectors instead of tokens."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.worker import (
    Embedding,
    EmbedRequest,
    End,
    Event,
    ExecuteRequest,
    LoadReport,
    Metrics,
    PrefixChange,
    Started,
)
from wherry_runtime.embedding.core import Computed, EmbeddingCore
from wherry_runtime.embedding.model import Embedder, load_embedder
from wherry_runtime.engine.core import EngineClosedError
from wherry_runtime.engine.setup import SHORT_TEXT
from wherry_runtime.engine.validation import RequestError, check_text, check_token_id, check_work
from wherry_runtime.loading.locate import locate
from wherry_runtime.scheduling.digest import Cursor
from wherry_runtime.scheduling.embedding import EmbeddingQueue, EmbeddingRequest
from wherry_runtime.scheduling.scheduler import QueueFullError
from wherry_runtime.server.surface import Rounded


class _Inbox:
    """What was computed of one request, on its way from the thread to its consumer."""

    def __init__(self) -> None:
        self.items: deque[Computed] = deque()
        self.ready = asyncio.Event()
        self.cancelled = False

    def put(self, news: Computed) -> None:
        self.items.append(news)
        self.ready.set()


class EmbeddingEngine:
    """Loads an embedding model, which is here, and answers requests. It belongs to the loop that calls `start`.

    Args:
        version: names model and settings.
    """

    def __init__(self, config: EngineConfig, version: str) -> None:
        self._config = config
        self._version = version
        self._embedder: Embedder | None = None
        self._core: EmbeddingCore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[str, _Inbox] = {}  # by key
        self._keys: dict[str, str] = {}  # request id → its key, which is never used again
        self._num_requests = 0
        self.rounded: Rounded | None = None

    async def start(self) -> None:
        """Loads the model off the event loop.

        Raises:
            ModelError: why it cannot be served.
        """
        self._loop = asyncio.get_running_loop()
        self._embedder = await asyncio.to_thread(load_embedder, self._config)
        if (config := self._config).quantization != "none":
            self.rounded = Rounded(locate(config.model_uri), config.quantization, config.quantization_group)
        queue = EmbeddingQueue(self._config.max_running, self._config.max_queued)
        self._core = EmbeddingCore(self._embedder, queue, self._report, self._config.max_batched_tokens)
        self._core.start()

    async def close(self) -> None:
        """Ends running requests with a retryable error, and frees the model."""
        core, self._embedder = self._core, None
        if core is not None:
            await asyncio.to_thread(core.close)

    async def generate(
        self, request: ExecuteRequest, admitted: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Event]:
        """Refuses.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "unsupported_task",
            f"{self._config.model_name!r} is an embedding model: it generates no text; send texts to /v1/embeddings",
            param="model",
        )
        yield  # a generator, like every engine's

    async def embed(
        self, request: EmbedRequest, admitted: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Event]:
        """Started, an Embedding for each text in order, Metrics and End; or an ErrorEvent as the last one.

        Closing the iterator cancels the request.

        Args:
            admitted: awaited once the request stands in the queue.

        Raises:
            RequestError: before that, if the request cannot start.
        """
        embedder, core = self._ready()
        check_work(request.id, request.model, request.priority, self._config.model_name)
        if request.id in self._keys:
            raise RequestError("duplicate_id", f"a request with id {request.id!r} is live already", param="id")
        arrived = time.monotonic()
        self._num_requests += 1
        key = self._keys[request.id] = f"{request.id}#{self._num_requests}"
        inbox = self._inboxes[key] = _Inbox()
        try:
            _check_dimensions(request.dimensions, embedder)
            texts = await self._tokenize(request, embedder)
            work = EmbeddingRequest(key, texts, request.priority, request.dimensions)
            _queue(core, work)
            if admitted is not None:
                await admitted()
            async for event in self._answer(request, work, inbox, arrived):
                yield event
        finally:
            del self._inboxes[key]
            del self._keys[request.id]
            core.cancel(key)

    async def _answer(
        self, request: EmbedRequest, work: EmbeddingRequest, inbox: _Inbox, arrived: float
    ) -> AsyncIterator[Event]:
        began: float | None = None
        while True:
            if not inbox.items:
                if inbox.cancelled:
                    yield End(finish_reason="cancelled", prompt_tokens=work.num_tokens, completion_tokens=0)
                    return
                inbox.ready.clear()
                await inbox.ready.wait()
                continue
            news = inbox.items.popleft()
            if began is None:
                began = time.monotonic()
                yield Started(
                    id=request.id, prompt_tokens=work.num_tokens, cached_tokens=0, seed=0, version=self._version
                )
            if news.error is not None:
                yield news.error
                return
            yield Embedding(index=news.index, vector=news.vector)
            if news.last:
                yield Metrics(queue_s=began - arrived, prefill_s=time.monotonic() - began, decode_s=0.0)
                yield End(finish_reason="stop", prompt_tokens=work.num_tokens, completion_tokens=0)
                return

    def cancel(self, request_id: str) -> bool:
        """Ends a request: its iterator gets an End with `cancelled`. False if no such request is live."""
        key = self._keys.get(request_id)
        if self._core is None or key is None:
            return False
        self._core.cancel(key)
        inbox = self._inboxes[key]
        inbox.cancelled = True
        inbox.ready.set()
        return True

    def load(self) -> LoadReport:
        """The engine's load now."""
        core = self._core
        running, waiting, owed = core.counts() if core else (0, 0, 0)
        return LoadReport(
            model=self._config.model_name,
            ready=core is not None and self._embedder is not None,
            running=running,
            waiting=waiting,
            max_running=self._config.max_running,
            kv_tokens_used=0,
            kv_tokens_total=0,
            prompt_tokens_total=core.tokens if core else 0,
            completion_tokens_total=0,
            prefix_hit_tokens_total=0,
            preemptions_total=0,
            steps_total=core.batches if core else 0,
            heartbeat_age_s=self.heartbeat_age(),
            tokens_owed=owed,
        )

    def prefixes_since(self, cursor: Cursor | None) -> tuple[Cursor | None, PrefixChange | None]:
        """Nothing: there is no prefix cache."""
        return None, None

    def heartbeat_age(self) -> float:
        """Seconds since the thread last came round; 0 before there is one."""
        return max(0.0, time.monotonic() - self._core.heartbeat) if self._core is not None else 0.0

    def bound(self) -> bool:
        """No other process depends on this one."""
        return False

    @property
    def max_model_len(self) -> int:
        """Tokens of a text at most."""
        return self._ready()[0].max_length

    def _ready(self) -> tuple[Embedder, EmbeddingCore]:
        if self._embedder is None or self._core is None:
            raise RequestError("not_ready", "the model is not loaded", status=503, retryable=True)
        return self._embedder, self._core

    def _report(self, news: list[Computed]) -> None:
        """Called by the core's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: list[Computed]) -> None:
        for one in news:
            if (inbox := self._inboxes.get(one.request_id)) is not None:
                inbox.put(one)

    async def _tokenize(self, request: EmbedRequest, embedder: Embedder) -> list[list[int]]:
        """Token ids of each text, off the event loop if there is much to do."""
        if not request.inputs:
            raise RequestError("empty_prompt", "input is empty; it needs at least one text", param="input")
        if sum(len(one) for one in request.inputs) <= SHORT_TEXT:
            return _tokens(request, embedder)
        return await asyncio.to_thread(_tokens, request, embedder)


def _queue(core: EmbeddingCore, work: EmbeddingRequest) -> None:
    try:
        core.add(work)
    except QueueFullError as e:
        raise RequestError("queue_full", f"{e}; try again later", status=429, retryable=True) from None
    except EngineClosedError as e:
        raise RequestError("shutting_down", str(e), status=503, retryable=True) from None


def _check_dimensions(dimensions: int | None, embedder: Embedder) -> None:
    if dimensions is None or embedder.pooling.allows(dimensions, embedder.width):
        return
    sizes = embedder.pooling.shortened
    known = "its vectors cannot be cut" if not sizes else f"it can be cut to {'fewer' if sizes is True else sizes}"
    raise RequestError(
        "unsupported_dimensions",
        f"dimensions {dimensions}: the model has {embedder.width}, and {known}; leave dimensions out",
        param="dimensions",
    )


def _tokens(request: EmbedRequest, embedder: Embedder) -> list[list[int]]:
    cut = request.truncate
    if cut is not None:
        if cut != -1 and not 1 <= cut <= embedder.max_length:
            raise RequestError(
                "invalid_value",
                f"truncate_prompt_tokens must be 1 to {embedder.max_length}, or -1 for that, not {cut}",
                param="truncate_prompt_tokens",
            )
        cut = embedder.max_length if cut == -1 else cut
    texts = []
    for place, given in enumerate(request.inputs):
        if isinstance(given, str):
            check_text(given)
            tokens = embedder.encode(given, cut)
        else:
            for token in given:
                check_token_id(token, embedder.model.config.vocab_size, code="invalid_token", param="input")
            tokens = given[:cut]
        _check_length(tokens, place, embedder.max_length)
        texts.append(tokens)
    return texts


def _check_length(tokens: list[int], place: int, most: int) -> None:
    if not tokens:
        raise RequestError("empty_prompt", f"input {place} is empty; it needs at least one token", param="input")
    if len(tokens) > most:
        raise RequestError(
            "context_length_exceeded",
            f"input {place} has {len(tokens)} tokens and the model takes {most}; shorten it, or set "
            "truncate_prompt_tokens to -1 to have its beginning embedded",
            param="input",
        )
