# syntax=docker/dockerfile:1
# Darkroom's images, one for each target:
#   migrate    migrates the database schema, then exits
#   api        the HTTP API, and the `darkroom` command
#   sender     sends webhooks
#   worker     claims microbatches; also deploys the models (`python -m workers serve`).
#              Without torch and Triton
#   serve      the Ray head and the replicas on it, in NVIDIA's Triton image
#   serve-cpu  the same on plain Python, with the Triton of nvidia-pytriton
#
# Base images are named by tag. To pin one, append its digest to the tag (`tag@sha256:…`):
#   docker buildx imagetools inspect python:3.12-slim-bookworm --format '{{.Manifest.Digest}}'

# All have one Python minor version: Ray's drivers and replicas exchange pickled functions.
# Debian 12: the Triton of nvidia-pytriton was tested there, and its libpython is shared.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
# 26.06: Python 3.12, TensorRT 11, CUDA 13.3 (driver 580 or newer), with the security fixes of
# May 2026. Compiled plans must come from the same tag.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.06-py3


FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HOME=/tmp
# Two users of one group: workers hold storage keys, which replicas, which run models, must not be
# able to read through /proc. Ray's folder belongs to its user, its sockets to the group.
RUN groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp darkroom \
    && useradd --uid 10002 --gid 10001 --no-create-home --home-dir /tmp darkroom-worker \
    && groupadd --gid 10003 darkroom-sender \
    && useradd --uid 10003 --gid 10003 --no-create-home --home-dir /tmp darkroom-sender \
    && python -m venv /opt/venv
WORKDIR /app
COPY pyproject.toml README.md requirements.lock ./
# Packages are installed before our code is copied, so that a change of the code does not install
# them again. The install is editable: the code is in /app, which is darkroom.settings.HOME.
COPY deploy/compose/package_folders.py /opt/
RUN python /opt/package_folders.py pyproject.toml \
    && pip install -c requirements.lock -e '.[server]'


FROM base AS migrate
COPY darkroom darkroom
COPY migrations migrations
USER 10001:10001
CMD ["python", "-m", "darkroom.db.connection", "migrate"]


FROM base AS api
RUN pip install -c requirements.lock -e '.[api]'
COPY darkroom darkroom
COPY models models
COPY api api
USER 10001:10001
EXPOSE 8000
CMD ["python", "-m", "api"]


FROM base AS sender
COPY darkroom darkroom
COPY workers workers
USER 10003:10003
CMD ["python", "-m", "workers", "send-webhooks"]


FROM base AS worker
RUN pip install -c requirements.lock -e '.[workers]'
COPY darkroom darkroom
COPY models models
COPY workers workers
USER 10002:10001
CMD ["python", "-m", "workers", "run"]


FROM base AS serve-cpu
# PyTorch from the default index includes CUDA, some gigabytes. PyTorch's own index of CPU builds
# has the same version without it: --build-arg TORCH_INDEX=…, see docs/deployment.md.
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install -c requirements.lock --no-deps --index-url "$TORCH_INDEX" torch; \
    fi \
    && pip install -c requirements.lock -e '.[workers,engine,triton]'
RUN install -d -o darkroom -g darkroom -m 0770 /run/ray
COPY darkroom darkroom
COPY models models
COPY model_repository model_repository
COPY engine engine
COPY workers workers
USER 10001:10001
CMD ["python", "-m", "ray.scripts.scripts", "start", "--head", "--block"]


FROM ${TRITON_IMAGE} AS serve
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HOME=/tmp
RUN groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp darkroom \
    && useradd --uid 10002 --gid 10001 --no-create-home --home-dir /tmp darkroom-worker \
    && python3 -m virtualenv /opt/venv
WORKDIR /app
COPY pyproject.toml README.md requirements.lock ./
COPY deploy/compose/package_folders.py /opt/
# The wheel of Triton's in-process API is in the image; it must be of the same release.
RUN python /opt/package_folders.py pyproject.toml \
    && pip install -c requirements.lock -e '.[workers,engine]' /opt/tritonserver/python/tritonserver-*.whl
RUN install -d -o darkroom -g darkroom -m 0770 /run/ray
COPY darkroom darkroom
COPY models models
COPY model_repository model_repository
COPY engine engine
COPY workers workers
USER 10001:10001
# NVIDIA's own entrypoint prints a banner and tries to link CUDA's compatibility libraries, as root
ENTRYPOINT []
CMD ["python", "-m", "ray.scripts.scripts", "start", "--head", "--block"]
