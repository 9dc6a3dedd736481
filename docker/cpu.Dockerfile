# gptoss_dist for CPUs: to prepare data, to try things, to train small models.
#
#   docker build -f docker/cpu.Dockerfile --build-arg REVISION="$(git describe --always --dirty --abbrev=12)" -t gptoss_dist:cpu .
#
# docs/containers.md says how it is run. Any Debian or Ubuntu with Python 3.11 or later will do as its base.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS builder
# Further sets of packages: "s3,ray" reads buckets, and prepares on Ray.
ARG EXTRAS=
# Another package index than PyPI.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The base decides on the versions of its packages: pinned ones vanish from its archive with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Python keeps no compiled files later, where nothing can be written: install.sh compiles the packages instead.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/gptoss_dist
# The dependencies are a layer of their own, which a change of the code does not touch.
COPY setup.cfg pyproject.toml ./
COPY launch/install.sh launch/constraints.txt launch/mb_cuda13_compat.h launch/
RUN sh launch/install.sh --venv /opt/venv --extras "$EXTRAS" --only-dependencies \
    && /opt/venv/bin/python -m pip uninstall --yes --quiet uv
COPY . .
ARG REVISION=
RUN sh launch/install.sh --venv /opt/venv \
    && /opt/venv/bin/python -m compileall -q data_pipeline gptoss_dist launch \
    && echo "$REVISION" >revision.txt

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 1000 -g 0 -m 0775 /workspace
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /opt/gptoss_dist /opt/gptoss_dist
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# Another Python than that of the stage above does not find the packages.
RUN ["/opt/venv/bin/python", "-c", "import numpy"]
ARG REVISION=
LABEL org.opencontainers.image.title="gptoss_dist" \
      org.opencontainers.image.description="Distributed training of GPT-OSS style mixture-of-experts models, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION"
# Any other id will do: docker run --user 12345:12345.
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["/opt/gptoss_dist/docker/entrypoint.sh"]
