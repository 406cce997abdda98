# SPDX-License-Identifier: Apache-2.0
"""Quantised tensors, of which there are none."""


class QuantizedTensor:
    """The base of FP8 tensors."""
