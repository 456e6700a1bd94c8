"""The engine that a model needs, which is known once the model is here."""

import asyncio
from collections.abc import AsyncGenerator

from wherry_protocol.engine_config import EngineConfig, fingerprint
from wherry_protocol.worker import EmbedRequest, Event, ExecuteRequest, LoadReport, PrefixChange
from wherry_runtime.embedding.engine import EmbeddingEngine
from wherry_runtime.embedding.model import is_embedding_model
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.loading.locate import with_local_models
from wherry_runtime.scheduling.digest import Cursor
from wherry_runtime.server.surface import Admitted, Engine, Rounded, events_of
from wherry_runtime.sources.progress import Download


class ModelEngine:
    """Generates, or embeds, as its model does."""

    def __init__(self, config: EngineConfig, download: Download | None = None) -> None:
        self._config = config
        self._download = download
        self._inner: Engine = AsyncEngine(config)

    async def start(self) -> None:
        """Downloads the model unless it is here, and loads it.

        Raises:
            ModelError: why it cannot be served.
        """
        config = await asyncio.to_thread(with_local_models, self._config, self._download)
        # The same wherever the model was downloaded to.
        version = fingerprint(self._config)
        embeds = await asyncio.to_thread(is_embedding_model, config)
        self._inner = EmbeddingEngine(config, version) if embeds else AsyncEngine(config, version=version)
        await self._inner.start()

    @property
    def embeds(self) -> bool:
        """Whether it turns texts into vectors."""
        return isinstance(self._inner, EmbeddingEngine)

    @property
    def rounded(self) -> Rounded | None:
        """See `Engine`."""
        return self._inner.rounded

    @property
    def max_model_len(self) -> int:
        return self._inner.max_model_len

    def generate(self, request: ExecuteRequest, admitted: Admitted | None = None) -> AsyncGenerator[Event, None]:
        """See `Engine`."""
        return events_of(self._inner, request, admitted)

    def embed(self, request: EmbedRequest, admitted: Admitted | None = None) -> AsyncGenerator[Event, None]:
        """See `Embeds`."""
        return events_of(self._inner, request, admitted)

    def cancel(self, request_id: str) -> bool:
        return self._inner.cancel(request_id)

    def load(self) -> LoadReport:
        return self._inner.load()

    def prefixes_since(self, cursor: Cursor | None) -> tuple[Cursor | None, PrefixChange | None]:
        return self._inner.prefixes_since(cursor)

    def heartbeat_age(self) -> float:
        return self._inner.heartbeat_age()

    def bound(self) -> bool:
        return self._inner.bound()

    async def close(self) -> None:
        await self._inner.close()
