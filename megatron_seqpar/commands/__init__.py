# SPDX-License-Identifier: Apache-2.0
"""The commands of `megatron-seqpar`, one a file."""
