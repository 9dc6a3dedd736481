# gptoss_dist for NVIDIA GPUs, with megablocks' CUDA extension compiled.
#
#   docker build -f docker/cuda.Dockerfile --build-arg REVISION="$(git describe --always --dirty --abbrev=12)" -t gptoss_dist:cuda .
#
# docs/containers.md says how it is run. CUDA's major version is that of the tested torch (launch/constraints.txt): torch
# brings the libraries of its own minor version, and the compiler has to fit its headers. Both images have to be the same
# distribution with the same Python.
ARG BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BUILD_IMAGE} AS builder
# 0 leaves out what needs CUDA: the same steps on a plain Debian or Ubuntu, with torch for CPUs. Tests build it so.
ARG CUDA=1
# GPUs that the extension is compiled for, such as "9.0"; by default what launch/install.sh names.
ARG TORCH_CUDA_ARCH_LIST=
# Further sets of packages: "s3,ray" reads buckets, and prepares on Ray.
ARG EXTRAS=
# Another package index than PyPI.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The base decides on the versions of its packages: pinned ones vanish from its archive with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Python keeps no compiled files later, where nothing can be written: install.sh compiles the packages instead.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/gptoss_dist
# The dependencies are a layer of their own, which a change of the code does not touch. No GPU is seen during a build:
# torch with CUDA is installed first, and install.sh keeps it.
COPY setup.cfg pyproject.toml ./
COPY launch/install.sh launch/constraints.txt launch/mb_cuda13_compat.h launch/
RUN python3 -m venv /opt/venv \
    && if [ "$CUDA" = 1 ]; then \
           /opt/venv/bin/python -m pip install --no-compile "$(grep '^torch==' launch/constraints.txt)"; \
       fi \
    && sh launch/install.sh --venv /opt/venv --extras "$EXTRAS" --only-dependencies \
    && if [ "$CUDA" = 1 ]; then /opt/venv/bin/python -c "import torch, megablocks_ops"; fi \
    && /opt/venv/bin/python -m pip uninstall --yes --quiet uv
COPY . .
ARG REVISION=
RUN sh launch/install.sh --venv /opt/venv \
    && /opt/venv/bin/python -m compileall -q data_pipeline gptoss_dist launch \
    && echo "$REVISION" >revision.txt

FROM ${BASE_IMAGE}
# Triton compiles a little C against Python's headers when a kernel first runs, and torch.compile C++ for the CPU's part.
# NCCL looks for InfiniBand's library.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ ibverbs-providers libibverbs1 python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 1000 -g 0 -m 0775 /workspace
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /opt/gptoss_dist /opt/gptoss_dist
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# Another Python than that of the stage above does not find the packages.
RUN ["/opt/venv/bin/python", "-c", "import numpy"]
ARG REVISION=
LABEL org.opencontainers.image.title="gptoss_dist" \
      org.opencontainers.image.description="Distributed training of GPT-OSS style mixture-of-experts models, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION"
# Any other id will do: docker run --user 12345:12345.
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["/opt/gptoss_dist/docker/entrypoint.sh"]
