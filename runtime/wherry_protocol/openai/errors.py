"""Errors as the OpenAI API shapes them: https://platform.openai.com/docs/guides/error-codes."""

import msgspec

from wherry_protocol.http.asgi import Headers


class ApiError(Exception):
    """An answer that is an error. Clients choose their exception by `status` and read the rest."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.allow = allow

    @property
    def kind(self) -> str:
        """The error's `type`."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def headers(self) -> Headers:
        """Retry-After, where a later try may do; Allow, where another method may."""
        found: Headers = [] if self.retry_after_s is None else [(b"retry-after", b"%d" % self.retry_after_s)]
        return found if self.allow is None else [*found, (b"allow", self.allow.encode())]

    def body(self) -> bytes:
        """{"error": {…}} as JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """400: the request cannot be answered as it is."""
    return ApiError(400, code, message, param=param)


def model_not_found(model: str, served: str) -> ApiError:
    """404: another model is served here."""
    shown = model if len(model) <= 100 else model[:100] + "…"
    return ApiError(
        404, "model_not_found", f"The model `{shown}` is not served here; this is `{served}`.", param="model"
    )


def not_found(path: str) -> ApiError:
    """404: no such path."""
    return ApiError(404, "unknown_url", f"There is nothing at {path[:200]}; GET /docs lists what there is.")


def method_not_allowed(method: str, path: str, allow: str) -> ApiError:
    """405: the path is right, the method is not. `allow`: those that are."""
    return ApiError(405, "method_not_allowed", f"{path[:200]} does not take {method[:20]}.", allow=allow)


def too_large(limit: int) -> ApiError:
    """413: the body is over the cap."""
    return ApiError(413, "request_too_large", f"The request's body is over {limit} bytes.")


def unauthorized() -> ApiError:
    """401: no key, or not the right one."""
    return ApiError(401, "invalid_api_key", "Send the API key as `Authorization: Bearer <key>`.")
