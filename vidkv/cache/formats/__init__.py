"""Page formats by name. A new format is one module here and one line in `FORMATS`."""

from vidkv.cache.formats.base import PageFormat
from vidkv.cache.formats.int8 import Int8
from vidkv.cache.formats.packed import K4V2, K8V4, Int2, Int4
from vidkv.cache.formats.plain import BF16, FP32

FORMATS: dict[str, type[PageFormat]] = {
    "fp32": FP32, "bf16": BF16, "int8": Int8, "k8v4": K8V4, "int4": Int4, "k4v2": K4V2, "int2": Int2,
}  # fmt: skip

__all__ = ["BF16", "FORMATS", "FP32", "K4V2", "K8V4", "Int2", "Int4", "Int8", "PageFormat"]
