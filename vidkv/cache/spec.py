"""Every cache setting, by name: `CacheSpec` says what is kept, `CacheGeometry` how large a page is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vidkv.errors import CacheSpecError

FIRST = (
    "format", "window", "sink", "policy", "positions", "keep_newest", "keep_sinks", "value_scale", "segment",
)  # fmt: skip
"""Settings that every `identity` has."""
BUDGETS = ("device_gb", "host_gb", "disk_gb")
"""Settings that say where pages lie; what is computed does not depend on them."""
BELOW_EIGHT_BITS = {"keep_sinks": True, "newer": "int8:3"}
"""Defaults of formats with fewer. In the embedded world sixteen bits for sinks and the newest frames instead
(`newer=bf16:3`) take 1.46 times the bytes for an attention error of 1.06e-2, not 1.10e-2, and as many objects
recalled (`vidkv eval cache --quick --spec int4 --spec int4,newer=bf16:3`, 2 CPU cores)."""


class CacheSpec(BaseModel):
    """What the KV cache keeps, where it puts it in time, and in which format.

    Has a one-line form for command lines and files: `int8,window=21,sink=3`. A word without `=` is a
    format or a switch.

    Attributes:
        format: how committed pages are stored in the end; a module of `vidkv.cache.formats`.
        window: latent frames kept, sinks and current chunk included; all of them are attended unless
            `select` says otherwise.
        sink: first latent frames, kept for good.
        policy: which pages leave when the window is full; a module of `vidkv.cache.policies`.
        positions: `relative` puts the frames that are left next to each other (sinks beside the
            window); `absolute` keeps true distances, as stock models were trained.
        keep_newest: hold as many of the newest frames as a chunk has in 16 bits (fp32 on the CPU); they
            are quantized when newer ones arrive.
        keep_sinks: sink frames stay in the format of the newest ones: 16 bits, or the first of `newer` where
            those are not kept. On by default below eight bits.
        newer: formats of the newest frames, newest first, behind those of `keep_newest`: `int8:6` or
            `int8:6+int4:9`, each with its number of latent frames. A page moves on as it ages. Below eight
            bits it is `int8:3` unless another, or none (`newer=`), is given.
        value_scale, key_scale: what one scale of V or K covers: a `token` of a head (or a `group` of its
            channels), or a `channel` of a page. INT8 keys have scales per token.
        group: channels of a token that share a scale, below eight bits; 0 for the whole head.
        hadamard: turn channels by a Hadamard matrix before coding, below eight bits (QuaRot, 2404.00456).
        fit: scales with the least squared `error`, or the `largest` value (nothing is clipped), likewise.
        keyframe: code keys against the mean of the first chunk at the same place in the picture instead of
            the mean of all places, likewise.
        centroids: code keys against the nearest of so many means, which k-means finds in the first chunk,
            instead of one; a byte per token and head says which, likewise.
        jensen: take out of the attention what zero-mean noise of the keys adds on average (2605.26266),
            likewise.
        keep_tokens: share of a page's tokens that stay once it has its final format.
        keep_by: which of them: those whose `key` differs most from the first frame's at the same place, or
            those with the largest attention `mass`, which the clean pass measures on a few queries.
        select: latent frames attended of those in the window, sinks and current chunk included: half of the
            others are the newest, half those whose mean keys meet the last chunk's queries best. 0: all.
        segment: pages that a two-pass read brings into scratch at a time.
        local_heads: kv heads of every layer that keep no pages and read the current chunk alone: those that
            were found to read least of the history (`vidkv eval heads`; Dummy Forcing, 2601.20499).
        device_gb: gigabytes that the cache may take on the device; pages of `format` that have no room lie in
            the host's memory and come when they are read. 0: all are on the device.
        host_gb: gigabytes of the host's memory for pages that may leave the device; what has no room there
            lies on disk. 0: as many as it takes.
        disk_gb: gigabytes on disk, for a cache that reads a selection (`select`). 0: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = "fp32"
    window: int = Field(default=21, ge=1)
    sink: int = Field(default=3, ge=0)
    policy: str = "sink_window"
    positions: Literal["relative", "absolute"] = "relative"
    keep_newest: bool = False
    keep_sinks: bool = False
    newer: str = ""
    value_scale: Literal["token", "channel"] = "token"
    key_scale: Literal["token", "channel"] = "token"
    group: int = Field(default=0, ge=0)
    hadamard: bool = True
    fit: Literal["error", "largest"] = "error"
    keyframe: bool = False
    centroids: int = Field(default=0, ge=0, le=256)
    jensen: bool = False
    keep_tokens: float = Field(default=1.0, gt=0, le=1)
    keep_by: Literal["key", "mass"] = "key"
    select: int = Field(default=0, ge=0)
    segment: int = Field(default=6, ge=1)
    local_heads: int = Field(default=0, ge=0)
    device_gb: float = Field(default=0.0, ge=0, le=1e9)
    host_gb: float = Field(default=0.0, ge=0, le=1e9)
    disk_gb: float = Field(default=0.0, ge=0, le=1e9)

    @model_validator(mode="before")
    @classmethod
    def _below_eight_bits(cls, values: Any) -> Any:
        """Large errors stay out of what is attended most, unless they are asked for."""
        if isinstance(values, Mapping) and _is_narrow(values.get("format")):
            return BELOW_EIGHT_BITS | dict(values)
        return values

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
        return cls.of(cls.settings_in(text))

    @classmethod
    def settings_in(cls, text: str) -> dict[str, Any]:
        """Names and texts of a one-line form, not checked any further; switches are True.

        Raises:
            CacheSpecError: a setting is given twice.
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
        return values

    def __str__(self) -> str:
        parts = [self.format]
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name == "format" or (value == self._default(name) and name not in ("window", "sink")):
                continue
            parts.append(name if value is True else f"{name}={str(value).lower()}")
        return ",".join(parts)

    def _default(self, name: str) -> Any:
        if name in BELOW_EIGHT_BITS and _is_narrow(self.format):
            return BELOW_EIGHT_BITS[name]
        return type(self).model_fields[name].default

    @property
    def identity(self) -> dict[str, Any]:
        """Settings as they go into a hash: later ones only where they are not the default, so that a new one
        changes no name of what was made before it, and no budgets."""
        fields, settings = type(self).model_fields, self.unbudgeted.model_dump()
        return {k: v for k, v in settings.items() if k in FIRST or v != fields[k].default}

    @property
    def unbudgeted(self) -> CacheSpec:
        """The same cache, all of it on the device."""
        return self.model_copy(update=dict.fromkeys(BUDGETS, 0.0))

    @property
    def tiers(self) -> list[tuple[str, int]]:
        """(format, latent frames) of `newer`, newest first."""
        parts = [part.partition(":") for part in self.newer.split("+")] if self.newer else []
        return [(name, int(frames)) for name, _, frames in parts]

    @property
    def attended(self) -> int:
        """Most latent frames that a chunk reads, itself included."""
        return min(self.select or self.window, self.window)

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
        for part in self.newer.split("+") if self.newer else []:
            name, _, frames = part.partition(":")
            if name not in FORMATS or not frames.isascii() or not frames.isdecimal() or not int(frames):
                raise CacheSpecError(
                    f"newer={self.newer!r:.60}: {part!r:.40} is no FORMAT:FRAMES such as int8:6; "
                    f"formats are {', '.join(FORMATS)}"
                )
        if not any(map(_is_narrow, (self.format, *(name for name, _ in self.tiers)))):
            self._check_unused("group", "fit", "keyframe", "centroids", "jensen", "key_scale", "hadamard")
        if self.keyframe and self.centroids:
            raise CacheSpecError("keyframe and centroids both say what keys are coded against; choose one")
        if self.keyframe and self.keep_tokens < 1:
            raise CacheSpecError("keyframe codes every token of a page; it does not go with keep_tokens")
        if (self.host_gb or self.disk_gb) and not self.device_gb:
            name = "host_gb" if self.host_gb else "disk_gb"
            raise CacheSpecError(
                f"{name}={getattr(self, name):g} is for pages that have no room on the device; say with "
                "device_gb how much there is"
            )
        if self.disk_gb and not self.host_gb:
            raise CacheSpecError(
                f"disk_gb={self.disk_gb:g} is for pages that have no room in the host's memory; say with "
                "host_gb how much there is"
            )
        if self.disk_gb and not self.select:
            raise CacheSpecError(
                f"disk_gb={self.disk_gb:g}: a cache that reads all its pages in every pass is not read from "
                "disk; say with select how many frames a chunk reads"
            )
        if self.keep_by == "mass" and self.keep_tokens == 1:
            raise CacheSpecError(
                "keep_by=mass says which tokens of a page stay, and keep_tokens=1 keeps all; say how many, "
                "such as keep_tokens=0.5, or leave it out"
            )
        if self.select and self.select > self.window:
            raise CacheSpecError(f"select={self.select} of a window of {self.window}; choose fewer")

    def _check_unused(self, *names: str) -> None:
        from vidkv.cache.formats import FORMATS

        given = [name for name in names if getattr(self, name) != self._default(name)]
        if given:
            raise CacheSpecError(
                f"{given[0]} says how pages below eight bits are coded, and {self.format} pages are not; "
                f"choose a format of {', '.join(filter(_is_narrow, FORMATS))}, or leave it out"
            )

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
        if self.select and self.sink + chunk_frames >= self.select:
            raise CacheSpecError(
                f"select={self.select}: sink={self.sink} and a chunk of {chunk_frames} latent frames leave "
                f"nothing to select; say at least {self.sink + chunk_frames + 1}, or 0 for the whole window"
            )
        return self.window - chunk_frames


def _is_narrow(name: Any) -> bool:
    from vidkv.cache.formats import FORMATS

    return isinstance(name, str) and name in FORMATS and FORMATS[name].narrow


@dataclass(frozen=True)
class CacheGeometry:
    """The size of one page and how many there are of each frame.

    Attributes:
        layers: transformer blocks; each holds its own page of a latent frame.
        kv_heads, head_dim: of the keys and values.
        height, width: tokens per column and row of one latent frame.
        chunk_frames: latent frames of the largest chunk.
        batch: independent videos whose pages lie side by side.
        head_order: kv heads of every layer, those first that read least of the history; empty where that has
            not been measured (`vidkv eval heads`).
    """

    layers: int
    kv_heads: int
    head_dim: int
    height: int
    width: int
    chunk_frames: int = 3
    batch: int = 1
    head_order: tuple[tuple[int, ...], ...] = ()

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
