# The MLflow server of docker/compose.yaml: MLflow in the version that the project is tested with, and a driver for Postgres.
#
#   docker build -f docker/mlflow.Dockerfile -t gptoss_dist:mlflow .
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
# Another package index than PyPI.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The base decides on the versions of its packages: pinned ones vanish from its archive with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 1000 -g 0 -m 0775 /artifacts
COPY launch/constraints.txt /opt/constraints.txt
# Versions are those of the constraints.
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --quiet --no-cache-dir -c /opt/constraints.txt mlflow psycopg2-binary
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
LABEL org.opencontainers.image.title="gptoss_dist MLflow server" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
WORKDIR /tmp
EXPOSE 5000
CMD ["mlflow", "server", "--help"]
