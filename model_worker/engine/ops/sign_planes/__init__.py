"""Sign planes of variants: matrices of one bit a number, added to those of the base.

    y = ... + sum over planes of  u ∘ ((v ∘ x) S^T)      for each row of a segment, with its variant's planes

        x [T, K] float32; S [N, K] of -1 and +1; u [N], v [K] float32; several planes, each of some of the outputs

Two forms, chosen for a whole segment of a step's rows:

    fewer than 16 rows    each thread of the linear layer prepares the rows for each distinct v of the layer; its tiles
                          add every plane to the rows' sums. A plane has 1/16 of the bytes of a bfloat16 weight.
    16 rows or more       the tile adds all planes to its panel of the base's weight, once, and multiplies with that:
                          a prompt's rows cost hardly more than the base's. Where the base multiplies integers, the
                          panel of planes is a product of its own.

What is the same: a row's bits depend on its own numbers and on the form alone, neither on other rows nor on how many
there are. The forms round in another order (about 1e-6 of the sum), so a token that was generated alone and is computed
again in a long segment, after preemption or as part of a prompt, has hidden states that differ by that. The most
likely token is another one only where two were as near to each other as that.

Source of planes: BitDelta, arXiv 2402.10193; of tables of sums: T-MAC, arXiv 2407.00088.
"""
