# SPDX-License-Identifier: Apache-2.0
#
#   docker build -t megatron-seqpar .
#   docker run --gpus all --ipc=host --rm -it megatron-seqpar bash scripts/quickstart.sh
#
# The image's own torch, Transformer Engine and flash-attn stay as they are: the environment made
# by scripts/common.sh sees them and pins each to the version it has.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.04-py3
FROM ${IMAGE}

RUN useradd --create-home --shell /bin/bash seqpar
COPY --chown=seqpar:seqpar . /home/seqpar/megatron_seqpar
USER seqpar
WORKDIR /home/seqpar/megatron_seqpar
ENV SEQPAR_SYSTEM_SITE=1
RUN bash -c 'source scripts/common.sh && seqpar_setup dev'
ENV PATH="/home/seqpar/megatron_seqpar/.venv/bin:${PATH}"
CMD ["bash"]
