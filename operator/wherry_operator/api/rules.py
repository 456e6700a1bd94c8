"""Validation rules in CEL, which the API server checks on every write: https://kubernetes.io/docs/reference/using-api/cel/.

A rule says in its message what to do, because the message is all that `kubectl apply` shows.
"""

from typing import Any

MAX_NAME = 40


def rule(expression: str, message: str, **more: Any) -> dict[str, Any]:
    return {"rule": expression, "message": message, **more}


def rules(*entries: dict[str, Any]) -> dict[str, Any]:
    """The entries as the schema extension that the API server reads."""
    return {"x-kubernetes-validations": list(entries)}


# Of a URI: whether the model comes from elsewhere.
DOWNLOADED = "matches('^(hf|s3|https?|oci)://')"

ROOT = rules(
    rule(
        f"size(self.metadata.name) <= {MAX_NAME} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        f"metadata.name must be at most {MAX_NAME} characters of a-z, 0-9 and '-', start with a letter and end with a "
        "letter or digit: the Service and the pods are named after it",
    )
)

SPEC = rules(
    rule(
        "!(has(self.replicas) && has(self.scaling))",
        "replicas and scaling exclude each other: remove spec.replicas and set scaling.minReplicas and "
        "scaling.maxReplicas, or remove spec.scaling",
    ),
    rule(
        f"!has(self.modelCache) || self.model.uri.{DOWNLOADED}",
        "modelCache is for models that are downloaded: hf://, s3://, https:// and oci://",
    ),
)

MODEL_URI = rules(
    rule(
        "!self.startsWith('hf:') || self.matches('^hf://[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*"
        "(@[^/@]+)?(/[^@]+)?$')",
        "a hub URI is hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME@REVISION/FILE.gguf",
    ),
    rule(
        "!self.startsWith('s3:') || self.matches('^s3://[a-z0-9][-a-z0-9.]+[a-z0-9](/.*)?$')",
        "an S3 URI is s3://BUCKET/PREFIX or s3://BUCKET/PATH/FILE.gguf",
    ),
    rule(
        "!self.matches('^https?:') || self.matches('^https?://[^/@?#]+/[^#]+#sha256=[0-9a-fA-F]{64}$')",
        "a web server's model needs its checksum: https://HOST/FILE.gguf#sha256=HEX, or the list of all its files, "
        "https://HOST/DIR/SHA256SUMS#sha256=HEX, as `sha256sum` makes it; credentials belong into model.secretName",
    ),
    rule(
        "!self.startsWith('oci:') || self.matches('^oci://[A-Za-z0-9.:-]+/[a-z0-9][a-z0-9._/-]*"
        "(:[A-Za-z0-9_][A-Za-z0-9_.-]*|@sha256:[0-9a-f]{64})?$')",
        "an OCI URI is oci://REGISTRY/REPOSITORY:TAG or oci://REGISTRY/REPOSITORY@sha256:HEX",
    ),
    rule(
        "!self.startsWith('file:') || self.matches('^file:///[^/].*$')",
        "a file URI is file:///ABSOLUTE/PATH: three slashes, and a path inside the container",
    ),
    rule(
        "!self.startsWith('pvc:') || self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?$')",
        "a pvc URI is pvc://CLAIM/PATH: the name of a PersistentVolumeClaim in this namespace, then a path inside it",
    ),
    rule(
        "!self.startsWith('sample:') || self.matches('^sample://[A-Za-z0-9][-A-Za-z0-9._]*$')",
        "a sample URI is sample://NAME, like sample://tiny",
    ),
    rule(
        "self.matches('^(hf|s3|https?|oci|file|pvc|sample):')",
        "the URI must start with hf://, s3://, https://, oci://, pvc://, file:// or sample://",
    ),
    rule("!self.matches('(^|/)[.][.](/|$)')", "the URI must not contain '..'"),
)

MODEL = rules(
    rule(
        f"!has(self.secretName) || self.uri.{DOWNLOADED}",
        "model.secretName is for models that are downloaded: hf://, s3://, https:// and oci://",
    ),
)

MODEL_CACHE = rules(
    rule(
        "[has(self.sizeLimit), has(self.claimName), has(self.hostPath)].filter(given, given).size() == 1",
        "modelCache needs one of sizeLimit, claimName and hostPath",
    ),
)

SCALING = rules(
    rule("self.minReplicas <= self.maxReplicas", "scaling.minReplicas must not be above scaling.maxReplicas"),
)

TARGETS = rules(
    rule(
        "has(self.requestsPerReplica) || has(self.kvUtilization)",
        "scaling.targets needs requestsPerReplica or kvUtilization",
    ),
)

# `string()` makes 0 and "0%" one case.
ROLLOUT = rules(
    rule(
        "!(string(self.maxSurge) in ['0', '0%'] && string(self.maxUnavailable) in ['0', '0%'])",
        "maxSurge and maxUnavailable are both 0, so no rollout could ever start: raise one of them",
    ),
    rule(
        "duration(self.drainTimeout) <= duration('1h')",
        "drainTimeout must be at most 1h",
    ),
)

PARALLELISM = rules(
    rule(
        "!has(self.ranksPerPod) || self.tensor % self.ranksPerPod == 0",
        "parallelism.ranksPerPod must divide parallelism.tensor: a replica is tensor / ranksPerPod whole pods",
    ),
)

NODE_UNREACHABLE = rules(
    rule(
        "duration(self) >= duration('2s') && duration(self) <= duration('5m')",
        "nodeUnreachable must be from 2s to 5m: shorter gaps are hiccups of a network, not lost nodes",
    ),
)

AUTH = rules(
    rule("has(self.secretName) || has(self.oidc)", "router.auth needs secretName or oidc, or both"),
)

REDIS = rules(
    rule("has(self.url) != has(self.secretName)", "limits.redis needs either url or secretName"),
)

WINDOW = rules(rule("duration(self) <= duration('1h')", "stabilizationWindow must be at most 1h"))

PRIORITY_CLASSES = rules(
    rule(
        "self.exists_one(c, c.default)",
        "exactly one of priorityClasses must have default: true; requests that name no class are of that one",
    ),
    rule(
        "self.all(c, self.exists_one(d, d.priority == c.priority))",
        "two of priorityClasses have the same priority; give each its own",
    ),
)

CACHE_SIZE = rules(
    rule("quantity(string(self)).compareTo(quantity('1Mi')) >= 0", "responseCache.size must be at least 1Mi")
)
CACHE_REDIS = rules(
    rule("has(self.url) != has(self.secretName)", "responseCache.redis needs either url or secretName"),
)
EMBEDDING_TIMEOUT = rules(
    rule(
        "duration(self) >= duration('10ms') && duration(self) <= duration('5s')",
        "responseCache.semantic.timeout must be from 10ms to 5s: a request waits for it",
    ),
)
CACHE_TTL = rules(
    rule("duration(self) >= duration('1s') && duration(self) <= duration('168h')", "ttl must be from 1s to 168h")
)
QUEUE_TIMEOUT = rules(rule("duration(self) <= duration('1h')", "queue timeouts must be at most 1h"))

RESOURCES = rules(
    rule(
        "!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) || "
        "quantity(string(self.requests[k])).compareTo(quantity(string(self.limits[k]))) <= 0)",
        "resources.requests must not be above resources.limits",
    )
)
