"""How the change of one tensor is stored: a folder of codecs, each a term of docs/formats/delta.md (ADR 0009).

    codec.py      what a codec is: `Term`, `DifferenceCodec`, `WholeCodec`
    policy.py     what was asked for: `CodecPolicy`
    choice.py     which terms a matrix gets: `encode_matrix(base, target, policy) -> EncodedMatrix`
    registry.py   the codecs by name: `DIFFERENCE_CODECS`, `WHOLE_CODECS`
    dense.py, sign.py, ternary.py, lowrank.py, sparse.py, replace.py, lossless.py

A tensor of two or more dimensions is coded as the matrix `tensor.reshape(-1, tensor.shape[-1])`, so codecs see [N, K]
only. Tensors of one dimension are replaced.
"""
