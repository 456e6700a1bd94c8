"""Names that the operator writes and the router, the runtime and people read: labels, ports, environment, buckets."""

DOMAIN = "inference.wherry.dev"

LABEL_DEPLOYMENT = f"{DOMAIN}/deployment"
LABEL_GROUP = f"{DOMAIN}/group"
LABEL_RANK = f"{DOMAIN}/rank"
LABEL_REVISION = f"{DOMAIN}/revision"

# On a pod that is to be taken away: the RFC 3339 time at which what still runs there is moved.
ANNOTATION_DRAIN = f"{DOMAIN}/drain"
# A pod's readiness gate: true once a router knows the pod. Routers themselves look at ContainersReady.
GATE_ROUTABLE = f"{DOMAIN}/routable"

LABEL_NAME = "app.kubernetes.io/name"
LABEL_INSTANCE = "app.kubernetes.io/instance"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_PART_OF = "app.kubernetes.io/part-of"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"

COMPONENT_RUNTIME = "runtime"
COMPONENT_ROUTER = "router"

# Above 1024 so that no part needs a privilege to listen, in a cluster or in local mode.
WORKER_PORT = 8000
GROUP_PORT = 8001  # on a group's leader: where its ranks meet
PROBE_PORT = 8002  # of a worker with TLS: /health and /ready without it, for kubelets and the operator
ROUTER_PORT = 8080
SERVICE_PORT = 8000

# What the port of the worker API is called on a pod; which of the two says how to speak to it.
PORT_PLAIN = "http"
PORT_TLS = "https"

ENV_WORKER_TOKEN = "WHERRY_WORKER_TOKEN"  # noqa: S105 - the variable's name
ENV_REDIS_URL = "WHERRY_REDIS_URL"  # may hold a password, so it is no flag
ENV_CACHE_REDIS_URL = "WHERRY_RESPONSE_CACHE_REDIS_URL"  # so may this
ENV_EMBEDDING_KEY = "WHERRY_EMBEDDING_KEY"
ENV_POD_IP = "POD_IP"
ENV_POD_NAME = "POD_NAME"
ENV_POD_NAMESPACE = "POD_NAMESPACE"
ENV_GROUP = "WHERRY_GROUP"  # the group's key; one of an older incarnation is refused
# In groups of more than one pod, named as LeaderWorkerSet does: pods in the group, this one's index, pod 0's IP.
ENV_GROUP_SIZE = "LWS_GROUP_SIZE"
ENV_WORKER_INDEX = "LWS_WORKER_INDEX"
ENV_LEADER_ADDRESS = "LWS_LEADER_ADDRESS"
# In the termination message of a rank that ended only because another one of its group did.
EXIT_PEER_LOST = "peer lost"
ENV_SAMPLE_MODELS = "WHERRY_SAMPLE_MODELS"
ENV_MODEL_CACHE = "WHERRY_MODEL_CACHE"  # directory of downloaded models, where --model-cache does not say it
ENV_MODEL_SECRET = "WHERRY_MODEL_SECRET"  # noqa: S105 - the directory that a Secret with credentials is mounted to
ENV_MEMORY_LIMIT = "WHERRY_MEMORY_LIMIT"  # in bytes, where no cgroup says it

HEADER_CORRELATION_ID = "X-Correlation-Id"

# Histogram buckets in seconds, the same in router and runtime so that their latencies can be set side by side.
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
