"""What of the API is not hot: models, health, metrics, and the description of it all."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from starlette.exceptions import HTTPException

from wherry_protocol.openai.embeddings import EmbeddingRequest
from wherry_protocol.openai.errors import ApiError, method_not_allowed, model_not_found, not_found
from wherry_protocol.openai.requests import ChatCompletionRequest, CompletionRequest

HOT_ROUTES: dict[str, type[ChatCompletionRequest] | type[CompletionRequest] | type[EmbeddingRequest]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}
_SUMMARIES = {
    "/v1/chat/completions": "Answer a conversation",
    "/v1/completions": "Go on with a text",
    "/v1/embeddings": "Turn texts into vectors",
}


def _respond(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers, "application/json")


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return _respond(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 405:
            return _respond(method_not_allowed(request.method, path, (error.headers or {}).get("Allow", "GET")))
        return _respond(
            not_found(path) if error.status_code == 404 else ApiError(error.status_code, "error", error.detail)
        )


def _model_card(model: str, created: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "wherry"}


def _add_models(app: FastAPI, model: str, created: int) -> None:
    @app.get("/v1/models", summary="The models served here")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model, created)]}

    @app.get("/v1/models/{model_id:path}", summary="One model", responses={404: {"description": "Another model"}})
    async def one_model(model_id: str) -> dict[str, Any]:
        if model_id != model:
            raise model_not_found(model_id, model)
        return _model_card(model, created)


def _add_health(app: FastAPI, unready: Callable[[], str | None], registry: CollectorRegistry) -> None:
    @app.get("/healthz", summary="Whether the router is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    # /health: where vLLM and SGLang have it, so that what asks them can ask us.
    @app.get("/health", include_in_schema=False)
    @app.get("/readyz", summary="Whether the router can take requests", responses={503: {"description": "Not now"}})
    async def readyz() -> dict[str, str]:
        reason = unready()
        if reason is not None:
            raise ApiError(503, "not_ready", reason, retry_after_s=1)
        return {"status": "ok"}

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_1_0_0)


def _describe_hot_routes(app: FastAPI) -> None:
    """The hot routes never pass through FastAPI, so its description gets them by hand."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for path, kind in HOT_ROUTES.items():
                model = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(model.pop("$defs", {}))
                schemas[kind.__name__] = model
                reference = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
                answers = {"200": {"description": "The answer, or server-sent events where `stream` is true"}}
                answers["default"] = {"description": "An error: {error: {message, type, param, code}}"}
                post = {
                    "summary": _SUMMARIES[path],
                    "requestBody": {"required": True, "content": reference},
                    "responses": answers,
                }
                schema["paths"][path] = {"post": post}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def make_surface(model: str, created: int, unready: Callable[[], str | None], registry: CollectorRegistry) -> FastAPI:
    """The FastAPI app behind the hot path."""
    app = FastAPI(title="Wherry", version="1", description="OpenAI-compatible API", redoc_url=None)
    # FastAPI would redirect `/v1/models/` with the client's Host header in the address.
    app.router.redirect_slashes = False
    _handle_errors(app)
    _add_models(app, model, created)
    _add_health(app, unready, registry)
    _describe_hot_routes(app)
    return app
