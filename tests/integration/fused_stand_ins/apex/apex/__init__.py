# SPDX-License-Identifier: Apache-2.0
"""Apex by name, in plain torch."""
