# SPDX-License-Identifier: Apache-2.0
"""The quickstart: a comparison of a small model, with and without the axis, in one command."""
