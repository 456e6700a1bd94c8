"""Names that the operator writes and the router, the runtime and people read: labels, ports, environment."""

DOMAIN = "inference.wherry.dev"

LABEL_DEPLOYMENT = f"{DOMAIN}/deployment"
LABEL_GROUP = f"{DOMAIN}/group"
LABEL_RANK = f"{DOMAIN}/rank"
LABEL_REVISION = f"{DOMAIN}/revision"

LABEL_NAME = "app.kubernetes.io/name"
LABEL_INSTANCE = "app.kubernetes.io/instance"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_PART_OF = "app.kubernetes.io/part-of"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"

COMPONENT_RUNTIME = "runtime"
COMPONENT_ROUTER = "router"

# Above 1024 so that no part needs a privilege to listen, in a cluster or in local mode.
WORKER_PORT = 8000
ROUTER_PORT = 8080
SERVICE_PORT = 8000

ENV_WORKER_TOKEN = "WHERRY_WORKER_TOKEN"  # noqa: S105 - the variable's name
ENV_POD_IP = "POD_IP"
ENV_POD_NAME = "POD_NAME"
ENV_POD_NAMESPACE = "POD_NAMESPACE"
ENV_SAMPLE_MODELS = "WHERRY_SAMPLE_MODELS"

HEADER_CORRELATION_ID = "X-Correlation-Id"
