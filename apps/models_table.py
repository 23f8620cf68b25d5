"""What models there are: `vidkv models`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vidkv.models.checkpoints.folders import models_home
from vidkv.models.registry import MODELS, weights_folder


def models_report() -> list[dict[str, Any]]:
    """One object per registry entry: how it is rolled out, where its weights are, and under which terms."""
    rows = []
    for entry in MODELS.values():
        folder = weights_folder(entry) or models_home() / entry.name
        source = entry.source
        rows.append(
            {
                "name": entry.name,
                "here": (folder / "model_index.json").is_file(),
                "folder": str(folder),
                "size": f"{entry.width}x{entry.height}",
                "fps": entry.fps,
                "chunk_frames": entry.chunk_frames,
                "window_frames": entry.window,
                "sink_frames": entry.sink,
                "repository": source.repository if source else None,
                "files": list(source.files) if source else [],
                "licence": source.licence if source else ("Apache-2.0" if entry.weights else None),
            }
        )
    return rows


def render(report: list[dict[str, Any]]) -> Table:
    """The report as a table for people."""
    table = Table("model", "here", "size", "fps", "chunk", "window/sink", "weights", "licence")
    for row in report:
        weights = (
            f"{row['repository']}: {', '.join(row['files'])}" if row["repository"] else "ships with vidkv"
        )
        if not row["repository"] and not row["here"]:
            weights = "none: a configuration to plan and measure with"
        table.add_row(
            row["name"],
            "yes" if row["here"] else "no",
            row["size"],
            str(row["fps"]),
            str(row["chunk_frames"]),
            f"{row['window_frames']}/{row['sink_frames']}",
            weights,
            row["licence"] or "",
        )
    return table
