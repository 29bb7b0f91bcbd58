"""The two error roots of the whole project and the errors that cross package borders.

    RootgraftError
    ├── ClientError            the caller can mend it (4xx; one line and exit status 1 on the command line)
    │   ├── InvalidRequestError        400  invalid_request
    │   │   └── ContextLengthError     400  context_length_exceeded
    │   ├── AuthenticationError        401  invalid_api_key
    │   ├── PermissionDeniedError      403  permission_denied
    │   ├── ModelNotFoundError         404  model_not_found
    │   ├── RequestTooLargeError       413  request_too_large
    │   ├── RateLimitError             429  rate_limit_exceeded
    │   ├── CheckpointError            400  checkpoint_invalid      missing, truncated or contradictory files
    │   ├── ProbeFailedError           400  probe_failed            a fine-tune does not answer as its maker measured
    │   ├── SignatureError             400  signature_invalid       a fine-tune is not signed by a key that is trusted
    │   ├── UnsupportedModelError      400  model_unsupported       we know that we cannot run it exactly
    │   └── InsufficientMemoryError    400  insufficient_memory
    └── ServerError            ours to mend (5xx)
        ├── InternalError              500  internal_error
        ├── UpstreamError              502  worker_failed           a worker broke off
        └── OverloadedError            503  overloaded              nobody can take it now; Retry-After is set

Every message says what to do next. Codes are stable: programs may match on them.
"""

from __future__ import annotations


class RootgraftError(Exception):
    """Base of all errors that are meant for a person or a client.

    Attributes:
        status: HTTP status that the error becomes.
        type: the `type` of the OpenAI error object.
        code: stable machine-readable code.
        param: the request field at fault, where there is one.
        retry_after_s: seconds after which a retry may succeed, where that is known.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ClientError(RootgraftError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequestError(ClientError):
    pass


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class AuthenticationError(ClientError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(ClientError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class ModelNotFoundError(ClientError):
    status = 404
    code = "model_not_found"


class RequestTooLargeError(ClientError):
    status = 413
    code = "request_too_large"


class RateLimitError(ClientError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class CheckpointError(ClientError):
    code = "checkpoint_invalid"


class ProbeFailedError(ClientError):
    code = "probe_failed"


class SignatureError(ClientError):
    code = "signature_invalid"


class UnsupportedModelError(ClientError):
    code = "model_unsupported"


class InsufficientMemoryError(ClientError):
    code = "insufficient_memory"


class ServerError(RootgraftError):
    pass


class InternalError(ServerError):
    pass


class UpstreamError(ServerError):
    status = 502
    code = "worker_failed"


class OverloadedError(ServerError):
    status = 503
    type = "overloaded_error"
    code = "overloaded"


_BY_CODE: dict[str, type[RootgraftError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        ContextLengthError,
        AuthenticationError,
        PermissionDeniedError,
        ModelNotFoundError,
        RequestTooLargeError,
        RateLimitError,
        CheckpointError,
        ProbeFailedError,
        SignatureError,
        UnsupportedModelError,
        InsufficientMemoryError,
        InternalError,
        UpstreamError,
        OverloadedError,
    )
}


def error_from_code(
    code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> RootgraftError:
    """Rebuild the error that another process reported by its stable code; an unknown code is an InternalError."""
    return _BY_CODE.get(code, InternalError)(message, param=param, retry_after_s=retry_after_s)
