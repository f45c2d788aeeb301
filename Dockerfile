# syntax=docker/dockerfile:1
# Darkroom's images, one for each target:
#   migrate    brings the schema up to date, then ends
#   api        the HTTP API, and the `darkroom` command
#   sender     sends webhooks
#   worker     claims microbatches; also deploys the models (workers.deploy.serve). No torch, no Triton
#   serve      the Ray head and the replicas on it, in NVIDIA's Triton image
#   serve-cpu  the same on plain Python, with the Triton that nvidia-pytriton carries
#
# Images are named by tag. To pin one, ask for its digest and append it to the tag (`tag@sha256:…`):
#   docker buildx imagetools inspect python:3.12-slim-bookworm --format '{{.Manifest.Digest}}'

# All of one Python minor version: Ray's drivers and replicas exchange pickled functions.
# Debian 12, because there the Triton of nvidia-pytriton was tried; its libpython is a shared one.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
# 26.06: Python 3.12, TensorRT 11, CUDA 13.3 (driver 580 or newer), and after the security fixes
# of May 2026. Compiled plans must come from the same tag.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.06-py3


FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HOME=/tmp
# Two users of one group: workers hold storage keys, and replicas, which run models, must not be
# able to read them through /proc. The folder is Ray's, its sockets are the group's.
RUN groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp darkroom \
    && useradd --uid 10002 --gid 10001 --no-create-home --home-dir /tmp darkroom-worker \
    && groupadd --gid 10003 darkroom-sender \
    && useradd --uid 10003 --gid 10003 --no-create-home --home-dir /tmp darkroom-sender \
    && python -m venv /opt/venv
WORKDIR /app
COPY pyproject.toml README.md requirements.lock ./
# Packages are installed before our code is copied, so that a change of it does not fetch them
# again. The install is an editable one: /app is where the code is, and darkroom.settings.HOME.
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
CMD ["python", "-m", "workers.webhooks.app"]


FROM base AS worker
RUN pip install -c requirements.lock -e '.[workers]'
COPY darkroom darkroom
COPY models models
COPY workers workers
USER 10002:10001
CMD ["python", "-m", "workers"]


FROM base AS serve-cpu
# PyTorch as the default index has it also carries CUDA, some gigabytes of it. Its makers' index of
# CPU builds has the same version without: --build-arg TORCH_INDEX=…, see docs/deployment.md.
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
# The wheel of Triton's in-process API lies in the image; it must be of the same release.
RUN python /opt/package_folders.py pyproject.toml \
    && pip install -c requirements.lock -e '.[workers,engine]' /opt/tritonserver/python/tritonserver-*.whl
RUN install -d -o darkroom -g darkroom -m 0770 /run/ray
COPY darkroom darkroom
COPY models models
COPY model_repository model_repository
COPY engine engine
COPY workers workers
USER 10001:10001
# NVIDIA's own prints a banner and tries to link CUDA's compatibility libraries, as root
ENTRYPOINT []
CMD ["python", "-m", "ray.scripts.scripts", "start", "--head", "--block"]
