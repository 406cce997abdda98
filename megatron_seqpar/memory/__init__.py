# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps and for how long; knows torch and nothing of Megatron or of attention.

    spans           a length cut into as many pieces as asked for
    chunked         any per-token function run piece by piece, in forward and in backward
    cross_entropy   LM head and loss piece by piece: logits of the whole sequence never exist
    logit_rows      the rows of a piece: what torch or Triton (triton_cross_entropy) makes of them
    offload         what backward will want, kept in host memory meanwhile
    sizes, choose   how much all that keeps, as formulas, and the pieces that make a step fit

The idea of computing MLP and LM head over pieces of the sequence is that of Mini-Sequence
Transformer (arXiv 2407.15892, section 3).
"""
