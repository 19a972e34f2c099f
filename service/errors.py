"""Every error that the service raises on purpose.

    Exception
    ├── ServiceError                       status  code
    │   ├── InvalidInput                   400     invalid_input
    │   ├── MalformedRequest               400     malformed_request
    │   ├── Unauthorized                   401     unauthorized
    │   ├── CrossOriginRefused             403     cross_origin_refused
    │   ├── UnknownModel                   404     unknown_model
    │   ├── UnknownPath                    404     unknown_path
    │   ├── MethodNotAllowed               405     method_not_allowed
    │   ├── NotAcceptable                  406     not_acceptable
    │   ├── RequestTimeout                 408     request_timeout
    │   ├── BodyTooLarge                   413     body_too_large
    │   ├── UnsupportedMediaType           415     unsupported_media_type
    │   ├── HeadTooLarge                   431     head_too_large
    │   ├── ModelFailed                    500     model_failed
    │   ├── InternalError                  500     internal_error
    │   ├── Overloaded                     503     overloaded
    │   ├── NotReady                       503     not_ready
    │   ├── RanksLost                      503     ranks_lost
    │   ├── DeviceLost                     503     device_lost
    │   └── DeadlineExceeded               504     deadline_exceeded
    ├── BundleError                        refuses to start; at a reload, that bundle is refused
    └── SettingError                       refuses to start; at a reload, what was read before stays

A message is shown to the client and has three parts: what came, what was expected, what to do. It never holds
internal text; that belongs to the exception chained with `from`. Turning an error into a response is not done here.
"""

from typing import ClassVar


class ServiceError(Exception):
    """An answer that is not a result. The subclasses fix what HTTP says about it; the message is its detail."""

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]


class InvalidInput(ServiceError):
    """The input or an option of it cannot be used; sending the same again fails again."""

    status = 400
    code = "invalid_input"
    title = "Invalid input"


class MalformedRequest(ServiceError):
    """What came is no HTTP, or contradicts itself; where the next request begins is not known."""

    status = 400
    code = "malformed_request"
    title = "Malformed request"


class Unauthorized(ServiceError):
    """The credential is missing or wrong."""

    status = 401
    code = "unauthorized"
    title = "Unauthorized"


class CrossOriginRefused(ServiceError):
    """A browser asks whether a page of another origin may call, and it may not."""

    status = 403
    code = "cross_origin_refused"
    title = "Cross-origin request refused"


class UnknownModel(ServiceError):
    """No endpoint has this name."""

    status = 404
    code = "unknown_model"
    title = "Unknown model"


class UnknownPath(ServiceError):
    """Nothing is served under this path."""

    status = 404
    code = "unknown_path"
    title = "Unknown path"


class MethodNotAllowed(ServiceError):
    """The path is served, but not with this method."""

    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"


class NotAcceptable(ServiceError):
    """The client wants a picture where there is nothing to draw."""

    status = 406
    code = "not_acceptable"
    title = "Not acceptable"


class RequestTimeout(ServiceError):
    """The client did not send its whole request in time."""

    status = 408
    code = "request_timeout"
    title = "Request timeout"


class BodyTooLarge(ServiceError):
    """The body has more bytes than are read."""

    status = 413
    code = "body_too_large"
    title = "Body too large"


class UnsupportedMediaType(ServiceError):
    """The body is of a type that the task does not read."""

    status = 415
    code = "unsupported_media_type"
    title = "Unsupported media type"


class HeadTooLarge(ServiceError):
    """The path, the query and the headers have more bytes than are read."""

    status = 431
    code = "head_too_large"
    title = "Head too large"


class ModelFailed(ServiceError):
    """The program failed, or its outputs mean nothing; the input is not to blame."""

    status = 500
    code = "model_failed"
    title = "Model failed"


class InternalError(ServiceError):
    """The service has a fault of its own; its log has the traceback."""

    status = 500
    code = "internal_error"
    title = "Internal error"


class Overloaded(ServiceError):
    """The queue is full.

    Attributes:
        retry_after_seconds: when trying again is worth it; what `Retry-After` says.
    """

    status = 503
    code = "overloaded"
    title = "Overloaded"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class NotReady(ServiceError):
    """The service is starting or stopping."""

    status = 503
    code = "not_ready"
    title = "Not ready"


class RanksLost(ServiceError):
    """The processes that share a long recording ended, and start again.

    Attributes:
        retry_after_seconds: when they should be ready; what `Retry-After` says.
    """

    status = 503
    code = "ranks_lost"
    title = "Ranks lost"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeviceLost(ServiceError):
    """The GPUs that the model ran on failed, and none is left.

    Attributes:
        retry_after_seconds: when one of them is tried again; what `Retry-After` says.
    """

    status = 503
    code = "device_lost"
    title = "Device lost"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(ServiceError):
    """The client's deadline passed before its result was there."""

    status = 504
    code = "deadline_exceeded"
    title = "Deadline exceeded"


class BundleError(Exception):
    """A bundle cannot be served: damaged, incomplete, or it does not reproduce its golden outputs."""


class SettingError(Exception):
    """A setting names something that cannot be used, such as a file."""
