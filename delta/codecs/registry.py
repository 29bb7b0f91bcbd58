"""The codecs by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from delta.codecs.codec import DifferenceCodec, WholeCodec
from delta.codecs.dense import DENSE
from delta.codecs.replace import REPLACE

DIFFERENCE_CODECS: Mapping[str, DifferenceCodec] = MappingProxyType({codec.name: codec for codec in (DENSE,)})
WHOLE_CODECS: Mapping[str, WholeCodec] = MappingProxyType({codec.name: codec for codec in (REPLACE,)})
