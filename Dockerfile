# Wherry's three images, for docker (BuildKit) and podman:
#
#   docker build --target operator -t wherry-operator .
#   docker build --target router   -t wherry-router .
#   docker build --target runtime  -t wherry-runtime .
#
# BASE           any image with Python 3.11 or newer as `python3`; the same one carries all three.
# TORCH_BACKEND  which torch the runtime gets: an index of PyTorch's (`cpu`, `cu130`, …), `pypi` (PyPI's wheel with all of
#                CUDA), or `pypi-slim` (PyPI's wheel without CUDA: a CPU image where only PyPI can be reached).
# UV_CACHE_DIR   where downloads are kept between builds; point it at a volume to share the machine's own cache.
# Secret `ca`    an extra CA bundle, for builds behind a proxy that inspects TLS: --secret id=ca,src=/path/to/bundle.crt
#
# Dependencies are layers of their own, resolved from pyproject.toml and constraints.txt: an edit of our code rebuilds
# the last, small layer only. See docs/install.md.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# Tools, which stay behind in this stage.
FROM ${BASE} AS build
ARG UV_VERSION=0.13.8
ARG HATCHLING_VERSION=1.33.0
ARG UV_CACHE_DIR=/var/cache/uv
ENV UV_CACHE_DIR=${UV_CACHE_DIR} UV_LINK_MODE=copy UV_NO_PROGRESS=1 UV_PYTHON_DOWNLOADS=never
# `with-ca COMMAND…` runs a command that trusts the build's CA bundle, if there is one
RUN printf '%s\n' '#!/bin/sh' '[ ! -s /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca' \
      'exec "$@"' > /usr/local/bin/with-ca && chmod 755 /usr/local/bin/with-ca
RUN --mount=type=secret,id=ca \
    apt-get update -qq && apt-get install -y -qq --no-install-recommends binutils >/dev/null \
 && if ! command -v pip >/dev/null; then apt-get install -y -qq --no-install-recommends python3-pip >/dev/null; fi \
 && with-ca pip install --quiet --no-cache-dir --break-system-packages --root-user-action=ignore \
      "uv==${UV_VERSION}" "hatchling==${HATCHLING_VERSION}" \
 && rm -rf /var/lib/apt/lists/*
RUN uv venv --quiet --python "$(command -v python3)" /opt/wherry

# One pinned list per image. Its text changes only with its own dependencies, so the layers made from it are kept.
FROM build AS requirements
ARG TORCH_BACKEND=cpu
COPY pyproject.toml constraints.txt /src/
RUN --mount=type=secret,id=ca --mount=type=cache,target=/var/cache/uv \
    case "${TORCH_BACKEND}" in pypi|pypi-slim) ;; *) backend="--torch-backend=${TORCH_BACKEND}" ;; esac; \
    mkdir /requirements && for image in operator router runtime; do \
      with-ca uv pip compile --quiet ${backend:-} --extra "$image" --constraints /src/constraints.txt \
        --no-header --no-annotate --emit-index-url --output-file "/requirements/$image.txt" /src/pyproject.toml || exit 1; \
    done

FROM build AS operator-deps
COPY --from=requirements /requirements/operator.txt /requirements.txt
RUN --mount=type=secret,id=ca --mount=type=cache,target=/var/cache/uv \
    with-ca uv pip install --quiet --python /opt/wherry --compile-bytecode --no-deps --requirements /requirements.txt

FROM build AS router-deps
COPY --from=requirements /requirements/router.txt /requirements.txt
RUN --mount=type=secret,id=ca --mount=type=cache,target=/var/cache/uv \
    with-ca uv pip install --quiet --python /opt/wherry --compile-bytecode --no-deps --requirements /requirements.txt

FROM build AS runtime-deps
ARG TORCH_BACKEND=cpu
COPY --from=requirements /requirements/runtime.txt /requirements.txt
COPY hack/slim_torch.py /usr/local/bin/
RUN --mount=type=secret,id=ca --mount=type=cache,target=/var/cache/uv \
    if [ "${TORCH_BACKEND}" = pypi-slim ]; then sed -i '/^triton==/d' /requirements.txt; fi \
 && case "${TORCH_BACKEND}" in pypi|pypi-slim) ;; *) backend="--torch-backend=${TORCH_BACKEND}" ;; esac \
 && with-ca uv pip install --quiet --python /opt/wherry ${backend:-} --no-deps --requirements /requirements.txt \
 && if [ "${TORCH_BACKEND}" = pypi-slim ]; then python3 /usr/local/bin/slim_torch.py /opt/wherry/lib/python3*/site-packages; fi \
 && { /opt/wherry/bin/python -m compileall -qq -j 2 /opt/wherry/lib || true; } \
 && /opt/wherry/bin/python -W error -c 'import torch; x = torch.ones(1, 2, 8, 8); \
      [torch.nn.functional.scaled_dot_product_attention(y, y, y) @ y for y in (x, x.bfloat16())]; print("torch", torch.__version__)'

# The native kernels: compiled again only when they change.
FROM build AS kernels
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ >/dev/null && rm -rf /var/lib/apt/lists/*
COPY runtime/wherry_runtime/kernels/cpu /kernels
RUN python3 /kernels/build.py --output /kernels/libwherry_cpu.so

# Our own code: a prefix that is laid over /opt/wherry.
FROM build AS code
COPY . /src
COPY --from=kernels /kernels/libwherry_cpu.so /kernels.so
RUN cd /src && WHERRY_PREBUILT_KERNELS=/kernels.so python3 -m hatchling build -t wheel -d /wheels >/dev/null \
 && uv pip install --quiet --python /opt/wherry --no-deps --no-cache --compile-bytecode --prefix /code /wheels/*.whl

# What every image has around it.
FROM ${BASE} AS base
RUN rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip \
      /usr/share/doc /usr/share/man /var/cache/apt /var/lib/apt/lists/* \
 && echo 'wherry:x:65532:65532:wherry:/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'wherry:x:65532:' >> /etc/group
ENV PATH=/opt/wherry/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 65532:65532
LABEL org.opencontainers.image.title=Wherry org.opencontainers.image.licenses=Apache-2.0

FROM base AS operator
COPY --from=operator-deps /opt/wherry /opt/wherry
COPY --from=code /code /opt/wherry
ENTRYPOINT ["wherry-operator"]

FROM base AS router
COPY --from=router-deps /opt/wherry /opt/wherry
COPY --from=code /code /opt/wherry
ENTRYPOINT ["wherry-router"]

FROM base AS runtime
COPY --from=runtime-deps /opt/wherry /opt/wherry
COPY examples/models /opt/wherry/models
ENV WHERRY_SAMPLE_MODELS=/opt/wherry/models
COPY --from=code /code /opt/wherry
ENTRYPOINT ["wherry-runtime"]
