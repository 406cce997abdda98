# SPDX-License-Identifier: Apache-2.0
#
# On GPUs, in NVIDIA's PyTorch image (the last target, which is built when none is named):
#
#   docker build -t megatron-seqpar .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --rm -it megatron-seqpar \
#       bash scripts/quickstart.sh
#
# Without GPUs, for trying and for continuous integration:
#
#   docker build --target cpu -t megatron-seqpar:cpu .
#   docker run --rm -it megatron-seqpar:cpu bash scripts/quickstart.sh
#
# The image's own torch, Transformer Engine, Apex and flash-attn stay as they are: the environment
# that scripts/common.sh makes sees them, and pins those it would otherwise install to the versions
# they have. Whatever else is installed has the versions of requirements/constraints.txt.
#
# Build arguments:
#   IMAGE       image of the GPU target; 26.06 is what Megatron-LM core_v0.19.0 is tested in
#   CPU_IMAGE   image of the CPU target
#   PINS        other versions than the tested ones: "megatron-core==0.18.2"
#   EXTRAS      extras to install; dev has what the tests need
#   UID         number of the user
#   VERSION, REVISION   for the image's labels
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL   where pip looks; with an index of CPU builds of torch the
#               CPU image is several GB smaller
#
# Neither target could be built where this was written, for want of a Docker daemon. What was done
# there is in docs/clusters.md.

ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_IMAGE=python:3.12-slim

FROM ${CPU_IMAGE} AS cpu
ARG UID=1001
ARG EXTRAS=dev
ARG PINS=""
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_seqpar (CPU)" \
      org.opencontainers.image.description="Megatron-LM with a sequence-parallel dimension, on gloo and the CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --create-home --uid "${UID}" --shell /bin/bash seqpar \
    && install --directory --owner=seqpar --group=seqpar /opt/megatron_seqpar
USER ${UID}
WORKDIR /opt/megatron_seqpar
ENV SEQPAR_SYSTEM_SITE=0 \
    SEQPAR_PINS="${PINS}" \
    PIP_NO_CACHE_DIR=1 \
    PATH="/opt/megatron_seqpar/.venv/bin:${PATH}"
# what decides what is installed comes first, so that changes elsewhere install nothing again
COPY --chown=seqpar:seqpar setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY --chown=seqpar:seqpar requirements requirements
COPY --chown=seqpar:seqpar scripts/common.sh scripts/common.sh
COPY --chown=seqpar:seqpar megatron_seqpar/__init__.py megatron_seqpar/__init__.py
RUN bash -c 'source scripts/common.sh && seqpar_setup "$1"' setup "${EXTRAS}"
COPY --chown=seqpar:seqpar . .
HEALTHCHECK --interval=5m --timeout=2m --start-period=30s --retries=2 \
    CMD ["megatron-seqpar", "doctor", "--device", "cpu", "--no-self-test"]
CMD ["bash"]

FROM ${IMAGE} AS gpu
ARG UID=1001
ARG EXTRAS=dev,gpu
ARG PINS=""
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_seqpar" \
      org.opencontainers.image.description="Megatron-LM with a sequence-parallel dimension" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# the image's Python is Ubuntu's, which makes no environments without this package
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "${UID}" --shell /bin/bash seqpar \
    && install --directory --owner=seqpar --group=seqpar /opt/megatron_seqpar
USER ${UID}
WORKDIR /opt/megatron_seqpar
ENV SEQPAR_SYSTEM_SITE=1 \
    SEQPAR_PINS="${PINS}" \
    PIP_NO_CACHE_DIR=1 \
    PATH="/opt/megatron_seqpar/.venv/bin:${PATH}"
COPY --chown=seqpar:seqpar setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY --chown=seqpar:seqpar requirements requirements
COPY --chown=seqpar:seqpar scripts/common.sh scripts/common.sh
COPY --chown=seqpar:seqpar megatron_seqpar/__init__.py megatron_seqpar/__init__.py
RUN bash -c 'source scripts/common.sh && seqpar_setup "$1"' setup "${EXTRAS}"
COPY --chown=seqpar:seqpar . .
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=2 \
    CMD ["megatron-seqpar", "doctor", "--no-self-test"]
CMD ["bash"]
