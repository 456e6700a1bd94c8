"""The part of an LLMDeployment that says which model is served, and where it is kept once it was downloaded."""

from pydantic import Field

from wherry_operator.api import rules
from wherry_operator.api.access import NAME
from wherry_operator.api.kube import CamelModel, Quantity


class Model(CamelModel):
    """The model that is served."""

    name: str = Field(
        description="Name that clients ask for, as `model` in a request. Letters, digits and ._:/- ; 128 at most.",
        pattern=r"^[A-Za-z0-9]([-A-Za-z0-9._:/]*[A-Za-z0-9])?$",
        max_length=128,
    )
    uri: str = Field(
        description="Where the weights are. Downloaded and checked, once for all pods that share a modelCache: "
        "hf://ORG/NAME[@REVISION][/FILE.gguf] (a hub), s3://BUCKET/PREFIX, https://HOST/FILE.gguf#sha256=HEX or "
        "https://HOST/DIR/SHA256SUMS#sha256=HEX, oci://REGISTRY/REPOSITORY:TAG. Here already: pvc://CLAIM/PATH (a "
        "PersistentVolumeClaim of this namespace, mounted read-only), file:///PATH (a directory inside the container "
        "image) or sample://NAME (a sample model that ships with the runtime, like sample://tiny).",
        max_length=1024,
        json_schema_extra=rules.MODEL_URI,
    )
    secret_name: str | None = Field(
        None,
        description="A Secret of this namespace with what the download needs, mounted into runtime pods only. Entries: "
        "HF_TOKEN, HF_ENDPOINT; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, "
        "AWS_ENDPOINT_URL; HTTP_AUTHORIZATION; .dockerconfigjson (type kubernetes.io/dockerconfigjson).",
        pattern=NAME,
        max_length=253,
    )


class ModelCache(CamelModel):
    """Where downloaded models are kept. Without it: in an emptyDir, which lasts as long as the pod."""

    size_limit: Quantity | None = Field(
        None, description="Bound of the emptyDir, like 50Gi: a pod that goes beyond it is evicted."
    )
    claim_name: str | None = Field(
        None,
        description="A PersistentVolumeClaim of this namespace that all pods share, and other deployments may; with "
        "several nodes it is ReadWriteMany. One pod downloads, the others wait for it.",
        pattern=NAME,
        max_length=253,
    )
    host_path: str | None = Field(
        None,
        description="A directory of each node, which is there and writable for user 65532. Pod Security `baseline` and "
        "`restricted` do not admit it.",
        pattern=r"^/[^\s]+$",
        max_length=1024,
    )
