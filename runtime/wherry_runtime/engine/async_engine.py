"""The engine as its users see it: `start`, `generate`, `close`."""

import asyncio
import gc
import secrets
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from wherry_protocol.engine_config import EngineConfig, fingerprint
from wherry_protocol.worker import Event, ExecuteRequest, FinishReason, LoadReport, PrefixChange
from wherry_runtime.engine.answer import Answer
from wherry_runtime.engine.core import EngineClosedError, EngineCore
from wherry_runtime.engine.live import Live, Progress
from wherry_runtime.engine.resume import check_resume, digest_of, recall
from wherry_runtime.engine.setup import Loaded, load
from wherry_runtime.engine.validation import (
    RequestError,
    check_identity,
    check_prompt,
    check_sampling,
    check_text,
    check_tokens,
)
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.locate import locate, with_local_models
from wherry_runtime.scheduling.digest import Cursor, Mark, marks_for
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import QueueFullError
from wherry_runtime.server.surface import Rounded
from wherry_runtime.sources.progress import Download
from wherry_runtime.tokenization.chat_template import TemplateError
from wherry_runtime.tokenization.detokenizer import Detokenizer

__all__ = ["AsyncEngine", "ModelError", "RequestError"]

SEED_BITS = 53  # what every JSON reader keeps exactly
# How long one thread may keep the interpreter while another wants it. The device's thread needs it for an instant
# between two steps (and PyTorch's operators after each of them), and the default is 5 ms: as long as a whole step.
SWITCH_INTERVAL_S = 0.0005


Ending = tuple[FinishReason, str | int | None]  # finish and stop reason


def _seed(request: ExecuteRequest) -> int:
    if request.resume is not None:
        return request.resume.seed
    return secrets.randbits(SEED_BITS) if request.sampling.seed is None else request.sampling.seed


class _Inbox:
    """Progress of one request on its way from the step loop to its consumer."""

    def __init__(self) -> None:
        self._items: deque[Progress] = deque()
        self._ready = asyncio.Event()
        self.cancelled = False  # maybe before the engine has the request

    def put(self, progress: Progress) -> None:
        self._items.append(progress)
        self._ready.set()

    async def take(self) -> list[Progress]:
        """Everything that has come, at least one."""
        await self._ready.wait()
        self._ready.clear()
        items = list(self._items)
        self._items.clear()
        return items


class AsyncEngine:
    """Loads a model and answers requests.

    One instance belongs to the event loop that calls `start`; the model runs in a thread of its own and never blocks
    it.
    """

    def __init__(self, config: EngineConfig, download: Download | None = None, version: str = "") -> None:
        """`version`: names model and settings, where `config` no longer says where the model came from."""
        self._config = config
        self._version = version or fingerprint(config)
        self._download = download
        self._loaded: Loaded | None = None
        self._core: EngineCore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[str, _Inbox] = {}  # by key
        self._keys: dict[str, str] = {}  # request id → its key in the engine
        self._num_requests = 0
        self.rounded: Rounded | None = None

    async def start(self) -> None:
        """Downloads the model unless it is here, loads it, off the event loop, and starts the step loop.

        Raises:
            ModelError: why the model cannot be served.
        """
        if self._core is not None:
            raise RuntimeError("the engine was started already")
        self._loop = asyncio.get_running_loop()
        config = await asyncio.to_thread(with_local_models, self._config, self._download)
        self._loaded = await asyncio.to_thread(load, config)
        if config.quantization != "none":
            self.rounded = Rounded(locate(config.model_uri), config.quantization, config.quantization_group)
        # What is loaded stays: the garbage collector need not walk through PyTorch's objects during a step.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._core = EngineCore(
            self._loaded.runner, self._loaded.new_scheduler, self._report, speculator=self._loaded.speculator
        )
        self._core.start()

    def bound(self) -> bool:
        """A group's other ranks wait for this one, not it for them."""
        return False

    async def close(self) -> None:
        """Ends running requests with a retryable error, and frees the model. May be called more than once."""
        core, loaded, self._loaded = self._core, self._loaded, None
        if core is not None:
            await asyncio.to_thread(core.close)
            gc.unfreeze()
        if loaded is not None and loaded.chat_template is not None:
            await asyncio.to_thread(loaded.chat_template.close)
        if loaded is not None and loaded.leader is not None:
            await asyncio.to_thread(loaded.leader.close)

    async def generate(
        self, request: ExecuteRequest, admitted: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Event]:
        """Started, Token…, Metrics, and End; or an ErrorEvent as the last one.

        Closing the iterator cancels the request. Text may lag behind tokens: see `worker.Token`.

        Args:
            admitted: awaited once the request stands in the queue.

        Raises:
            RequestError: before that, if the request cannot start.
        """
        check_identity(request, self._ready_model())
        if request.id in self._keys:
            raise RequestError("duplicate_id", f"a request with id {request.id!r} is live already", param="id")
        # The engine knows a request by a key that is never used again. An id may be, while the engine still lets go of
        # the request that had it before.
        self._num_requests += 1
        key = self._keys[request.id] = f"{request.id}#{self._num_requests}"
        inbox = self._inboxes[key] = _Inbox()
        answer: Answer | None = None
        try:
            answer, over = await self._admit(request, key)
            if admitted is not None:
                await admitted()
            if over is not None:
                for event in answer.over(*over):
                    yield event
                return
            if inbox.cancelled:
                self.cancel(request.id)
            while not answer.ended:
                for event in answer.take(await inbox.take()):
                    yield event
        finally:
            del self._inboxes[key]
            del self._keys[request.id]
            if answer is not None and answer.needs_cancel and self._core is not None:
                self._core.cancel(key)

    def cancel(self, request_id: str) -> bool:
        """Ends a request: its iterator gets an End with `cancelled`. False if no such request is live."""
        key = self._keys.get(request_id)
        if self._core is None or key is None:
            return False
        self._inboxes[key].cancelled = True
        self._core.cancel(key)
        return True

    def load(self) -> LoadReport:
        """The engine's load now."""
        core = self._core
        ready = core is not None and self._loaded is not None
        blocks = core.scheduler.blocks if core else None
        used = (blocks.num_blocks - blocks.num_free) * blocks.block_size if blocks else 0
        return LoadReport(
            model=self._config.model_name,
            ready=ready,
            running=core.num_running if core else 0,
            waiting=core.num_waiting if core else 0,
            max_running=core.scheduler.max_running if core else self._config.max_running,
            kv_tokens_used=used,
            kv_tokens_total=blocks.num_blocks * blocks.block_size if blocks else 0,
            prompt_tokens_total=core.prompt_tokens if core else 0,
            completion_tokens_total=core.completion_tokens if core else 0,
            prefix_queried_tokens_total=core.prefix_queried_tokens if core else 0,
            prefix_hit_tokens_total=core.prefix_hit_tokens if core else 0,
            preemptions_total=core.preemptions if core else 0,
            draft_tokens_total=core.draft_tokens if core else 0,
            accepted_tokens_total=core.accepted_tokens if core else 0,
            steps_total=core.steps if core else 0,
            heartbeat_age_s=self.heartbeat_age(),
            tokens_owed=core.scheduler.tokens_owed if core else 0,
        )

    def prefixes_since(self, cursor: Cursor | None) -> tuple[Cursor | None, PrefixChange | None]:
        """What changed in the prefix cache since `cursor` (None: all of it), and the next cursor."""
        if self._core is None or not self._core.scheduler.blocks.prefix_cache:
            return None, None
        return self._core.scheduler.blocks.digest.since(cursor)

    def heartbeat_age(self) -> float:
        """Seconds since the step loop last came round; 0 before there is one (loading is not a hang)."""
        return max(0.0, time.monotonic() - self._core.heartbeat) if self._core is not None else 0.0

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._ready().max_model_len

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer unless `ignore_eos`."""
        return self._ready().model_config.eos_token_ids

    @property
    def family(self) -> str:
        """Such as `llama`."""
        return self._ready().model_config.family

    @property
    def dtype(self) -> str:
        """Of weights and KV cache, such as `bfloat16`."""
        return str(self._ready().dtype).removeprefix("torch.")

    @property
    def num_parameters(self) -> int:
        return self._ready().num_parameters

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._ready().device.torch.type

    def count_tokens(self, text: str) -> int:
        """How many tokens `text` has, special ones not added."""
        return len(self._ready().tokenizer.encode(text, special_tokens=False))

    def _ready(self) -> Loaded:
        if self._loaded is None:
            raise RequestError("not_ready", "the model is not loaded", status=503, retryable=True)
        return self._loaded

    def _running(self) -> EngineCore:
        if self._core is None:
            raise EngineClosedError("the engine is not running")
        return self._core

    def _ready_model(self) -> str:
        self._ready()
        return self._config.model_name

    async def _admit(self, request: ExecuteRequest, key: str) -> tuple[Answer, Ending | None]:
        """Validates the rest and queues the request, unless it resumes an answer that has ended: then also how."""
        loaded = self._ready()
        vocab_size = loaded.model_config.vocab_size
        check_prompt(request.prompt)
        check_sampling(request.sampling, vocab_size)
        prompt = await self._tokenize(request, loaded)
        check_tokens(prompt, vocab_size, loaded.max_model_len)
        digest = digest_of(prompt)
        if request.resume is not None:
            check_resume(request.resume, request.sampling, digest, vocab_size)
        live = self._live(request, key, prompt, loaded)
        is_chat = request.prompt.messages is not None
        detokenizer = Detokenizer(loaded.tokenizer, request.sampling.stop, strip_leading_space=is_chat)
        answer = Answer(request.id, live, loaded.tokenizer, detokenizer, digest, self._version)
        if live.request.num_resumed:
            # Off the event loop, which thousands of tokens would hold up for everybody.
            over = await asyncio.to_thread(recall, live, detokenizer)
            if over is not None:
                return answer, over
        try:
            self._running().add(live)
        except QueueFullError as e:
            raise RequestError("queue_full", f"{e}; try again later", status=429, retryable=True) from None
        except EngineClosedError as e:
            raise RequestError("shutting_down", str(e), status=503, retryable=True) from None
        return answer, None

    async def _tokenize(self, request: ExecuteRequest, loaded: Loaded) -> list[int]:
        prompt = request.prompt
        if prompt.token_ids is not None:
            return list(prompt.token_ids)
        if prompt.text is not None:
            check_text(prompt.text)
            return await loaded.encode(prompt.text, special_tokens=True)
        if not prompt.messages:
            raise RequestError("empty_prompt", "messages is empty; it needs at least one message", param="messages")
        if loaded.chat_template is None:
            raise RequestError(
                "chat_template_missing",
                "this model has no chat template; use completions, or give its directory a chat_template.jinja",
                param="messages",
            )
        try:
            text = await asyncio.to_thread(loaded.chat_template.render, prompt.messages, request.created)
        except TemplateError as e:
            status = 400 if e.refused else 500
            raise RequestError("chat_template_error", str(e), status=status, param="messages") from e
        check_text(text)
        # The template writes special tokens itself, as text.
        return await loaded.encode(text, special_tokens=False)

    def _live(self, request: ExecuteRequest, key: str, tokens: list[int], loaded: Loaded) -> Live:
        params = request.sampling
        room = loaded.max_model_len - len(tokens)
        max_new = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.max_tokens is None:
            max_new = min(max_new, loaded.kv_tokens - len(tokens))
        needed = len(tokens) + max_new
        if needed > loaded.kv_tokens or max_new < 1:
            raise RequestError(
                "kv_cache_too_small",
                f"prompt and answer need {max(needed, len(tokens) + 1)} tokens of KV cache and there are "
                f"{loaded.kv_tokens}; ask for fewer tokens, or give the engine more cache",
                param="max_tokens",
            )
        resume = request.resume
        begun = [] if resume is None else resume.token_ids
        if len(begun) > max_new:
            raise RequestError(
                "invalid_resume", f"resume has {len(begun)} tokens and there is room for {max_new}", param="resume"
            )
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(t for t in loaded.model_config.eos_token_ids if t < loaded.model_config.vocab_size)
        return Live(
            request=Request(
                id=key,
                tokens=tokens + begun,
                max_new_tokens=max_new,
                priority=request.priority,
                marks=self._marks(request, len(tokens)),
                num_resumed=len(begun),
                salt=request.cache_salt.encode(),
            ),
            params=params,
            seed=_seed(request),
            stop_ids=frozenset(stop_ids),
        )

    def _marks(self, request: ExecuteRequest, num_tokens: int) -> list[Mark]:
        blocks = self._core.scheduler.blocks if self._core is not None else None
        if blocks is None or not blocks.prefix_cache:
            return []
        return marks_for(request, num_tokens, blocks.block_size)

    def _report(self, progress: list[Progress]) -> None:
        """Called by the step loop's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, progress)

    def _deliver(self, progress: list[Progress]) -> None:
        for item in progress:
            if (inbox := self._inboxes.get(item.request_id)) is not None:
                inbox.put(item)
