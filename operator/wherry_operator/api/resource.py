"""An LLMDeployment as it was read from the API server."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from wherry_operator.api.v1alpha1 import API_VERSION, KIND, LLMDeploymentSpec

FINALIZER = "inference.wherry.dev/cleanup"


class InvalidSpecError(ValueError):
    """The spec cannot be used, for a reason that the API server's rules do not see. The text is for the user."""


@dataclass(frozen=True)
class LLMDeployment:
    """The object's identity and spec; `spec` is None when it cannot be read, and `spec_error` says why."""

    name: str
    namespace: str
    uid: str
    generation: int = 1
    resource_version: str = ""
    deleting: bool = False
    finalizers: tuple[str, ...] = ()
    spec: LLMDeploymentSpec | None = None
    spec_error: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> "LLMDeployment":
        """Reads the object; a spec that cannot be read is kept as an error, never raised."""
        metadata = raw["metadata"]
        spec, error = None, ""
        try:
            spec = LLMDeploymentSpec.model_validate(raw.get("spec", {}))
        except ValidationError as invalid:
            problems = (f"spec.{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in invalid.errors())
            error = "; ".join(problems)
        return cls(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata.get("uid", ""),
            generation=metadata.get("generation", 1),
            resource_version=metadata.get("resourceVersion", ""),
            deleting="deletionTimestamp" in metadata,
            finalizers=tuple(metadata.get("finalizers", ())),
            spec=spec,
            spec_error=error,
            status=raw.get("status") or {},
            annotations=metadata.get("annotations") or {},
        )

    def owner_reference(self) -> dict[str, Any]:
        """What ties a child to this object, so that garbage collection takes it along."""
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
