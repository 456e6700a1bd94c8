"""What went wrong in a step, and what to say of it."""

import gc

import torch

from wherry_protocol.worker import ErrorEvent
from wherry_runtime.engine.sampling import BadLogitsError

# PyTorch has a type for an accelerator's memory that its own allocator gives out. The CPU's allocator raises a plain
# RuntimeError, and so does what libraries take on a GPU for themselves.
_ALLOCATORS = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller step might succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(part in text for part in _ALLOCATORS)


def release_memory() -> None:
    """Gives back what a failed step held and what allocators keep for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def event_of(error: Exception) -> ErrorEvent:
    """What the request's client is told."""
    if isinstance(error, BadLogitsError):
        return ErrorEvent(code="bad_logits", message=str(error))
    if is_out_of_memory(error):
        return ErrorEvent(code="out_of_memory", message="the step needs more memory than there is", retryable=True)
    return ErrorEvent(code="engine_error", message=f"the step failed: {type(error).__name__}", retryable=True)
