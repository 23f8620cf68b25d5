"""Every cache setting, by name: `CacheSpec` says what is kept, `CacheGeometry` how large a page is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vidkv.errors import CacheSpecError


class CacheSpec(BaseModel):
    """What the KV cache keeps, where it puts it in time, and in which format.

    Has a one-line form for command lines and files: `int8,window=21,sink=3`. A word without `=` is a
    format or a switch.

    Attributes:
        format: how committed pages are stored; a module of `vidkv.cache.formats`.
        window: latent frames attended, sinks and current chunk included.
        sink: first latent frames, kept for good.
        policy: which pages leave when the window is full; a module of `vidkv.cache.policies`.
        positions: `relative` puts the frames that are left next to each other (sinks beside the
            window); `absolute` keeps true distances, as stock models were trained.
        keep_newest: hold as many of the newest frames as a chunk has in 16 bits (fp32 on the CPU); they
            are quantized when newer ones arrive.
        keep_sinks: never quantize sink frames.
        value_scale: what one INT8 scale of V covers: a `token` of a head, or a `channel` of a page.
        segment: pages that a two-pass read brings into scratch at a time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = "fp32"
    window: int = Field(default=21, ge=1)
    sink: int = Field(default=3, ge=0)
    policy: str = "sink_window"
    positions: Literal["relative", "absolute"] = "relative"
    keep_newest: bool = False
    keep_sinks: bool = False
    value_scale: Literal["token", "channel"] = "token"
    segment: int = Field(default=6, ge=1)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> CacheSpec:
        """Validate a mapping of settings.

        Raises:
            CacheSpecError: an unknown name or a value out of range.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            contradiction = first.get("ctx", {}).get("error")
            if isinstance(contradiction, CacheSpecError):
                raise contradiction from None
            name = ".".join(str(part) for part in first["loc"])
            raise CacheSpecError(
                f"cache setting {name}={first['input']!r:.60}: {first['msg'].lower()}; "
                f"settings are {', '.join(cls.model_fields)}"
            ) from None

    def model_post_init(self, context: Any) -> None:
        """Names are checked however a spec is made, not only by `of`."""
        self._check_names()

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """Read the one-line form, e.g. `int8,window=30,sink=3,positions=absolute,keep_newest`.

        Raises:
            CacheSpecError: naming the part that cannot be read.
        """
        values: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, text_value = (piece.strip() for piece in part.partition("="))
            value: str | bool = text_value
            if not equals:
                switch = name in cls.model_fields and cls.model_fields[name].annotation is bool
                name, value = (name, True) if switch else ("format", name)
            if name in values:
                raise CacheSpecError(f"cache setting {name!r:.60} is given twice in {text!r:.120}")
            values[name] = value
        return cls.of(values)

    def __str__(self) -> str:
        parts = [self.format]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name == "format" or (value == field.default and name not in ("window", "sink")):
                continue
            parts.append(name if value is True else f"{name}={value}")
        return ",".join(parts)

    def _check_names(self) -> None:
        from vidkv.cache.formats import FORMATS
        from vidkv.cache.policies import POLICIES

        if self.format not in FORMATS:
            raise CacheSpecError(
                f"cache format {self.format!r:.60} is unknown; formats are {', '.join(FORMATS)}"
            )
        if self.policy not in POLICIES:
            raise CacheSpecError(
                f"cache policy {self.policy!r:.60} is unknown; policies are {', '.join(POLICIES)}"
            )
        if self.policy == "sliding_window" and self.sink:
            raise CacheSpecError(f"sink={self.sink}: the policy sliding_window keeps no sinks; say sink=0")

    def capacity(self, chunk_frames: int) -> int:
        """Latent frames that stay resident between chunks: window - chunk.

        Raises:
            CacheSpecError: sinks and one chunk do not fit into the window.
        """
        if self.sink + chunk_frames > self.window:
            raise CacheSpecError(
                f"sink={self.sink} plus a chunk of {chunk_frames} latent frames does not fit into "
                f"window={self.window}; the window counts sinks and the current chunk, so it must be at "
                f"least {self.sink + chunk_frames}"
            )
        return self.window - chunk_frames


@dataclass(frozen=True)
class CacheGeometry:
    """The size of one page and how many there are of each frame.

    Attributes:
        layers: transformer blocks; each holds its own page of a latent frame.
        kv_heads, head_dim: of the keys and values.
        height, width: tokens per column and row of one latent frame.
        chunk_frames: latent frames of the largest chunk.
        batch: independent videos whose pages lie side by side.
    """

    layers: int
    kv_heads: int
    head_dim: int
    height: int
    width: int
    chunk_frames: int = 3
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens per latent frame."""
        return self.height * self.width

    @classmethod
    def of_model(
        cls, config: Any, latent_height: int, latent_width: int, chunk_frames: int, batch: int = 1
    ) -> CacheGeometry:
        """Geometry for a `CausalWanTransformer3DModel` configuration and a latent size."""
        _, ph, pw = config.patch_size
        return cls(
            layers=config.num_layers,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.attention_head_dim,
            height=latent_height // ph,
            width=latent_width // pw,
            chunk_frames=chunk_frames,
            batch=batch,
        )
