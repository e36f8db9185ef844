"""The codecs by name."""

from shoal.comm.compression.cast import Bfloat16, Float16
from shoal.comm.compression.codec import Codec
from shoal.comm.compression.int8 import Int8Blocks
from shoal.comm.compression.onebit import SignBits
from shoal.comm.compression.topk import TopShare

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Float16, Bfloat16, Int8Blocks, TopShare, SignBits)}
