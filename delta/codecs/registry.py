"""The codecs by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from delta.codecs.codec import DifferenceCodec, WholeCodec
from delta.codecs.dense import DENSE
from delta.codecs.lossless import LOSSLESS
from delta.codecs.lowrank import LOW_RANK
from delta.codecs.replace import REPLACE
from delta.codecs.sign import SIGN
from delta.codecs.sparse import SPARSE
from delta.codecs.ternary import TERNARY

DIFFERENCE_CODECS: Mapping[str, DifferenceCodec] = MappingProxyType(
    {codec.name: codec for codec in (DENSE, SIGN, TERNARY, LOW_RANK, SPARSE)}
)
WHOLE_CODECS: Mapping[str, WholeCodec] = MappingProxyType({codec.name: codec for codec in (REPLACE, LOSSLESS)})
