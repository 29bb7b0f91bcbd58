"""Sparse matrices of variants: those numbers of a matrix that are not 0.

    y = ... + x Z^T      for each row of a segment, with its variant's Z [N, K]

In segments of fewer than 16 rows x is gathered, 16 outputs at a time, in the order of the columns. In others Z is
added to the panel of the base's weight, as sign planes are; what that means for a row's bits is in ops/sign_planes.
"""
