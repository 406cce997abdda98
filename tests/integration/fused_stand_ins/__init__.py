# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for Transformer Engine and Apex, each in a folder to be put on PYTHONPATH.

They have the classes that Megatron's stock layer specs build on, with the arithmetic of the real
ones in plain torch: a machine without a GPU sees which of them a model is built of, and that its
numbers stay what they are. Anything else of the real packages is missing, and asking for it fails.
"""
