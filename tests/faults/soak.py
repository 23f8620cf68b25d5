"""Campaigns of faults until their targets are reached: `python -m tests.faults.soak --minutes 60 --jobs 2`.

Every batch is a process with a seed of its own. Its counts are added to `soak.json` beside this file as soon
as it ends: a soak can be stopped at any time, and goes on with the next seeds. `--table` prints the counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.kills import environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = HERE / "soak.json"
COLUMNS = ("lost", "duplicated", "undecodable", "differing")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no batch after so long")
    parser.add_argument("--only", action="append", metavar="CAMPAIGN", help="these campaigns; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="batches at a time")
    parser.add_argument("--file", type=Path, default=RECORD, help="where counts accumulate")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vidkv-soak")
    parser.add_argument("--table", action="store_true", help="print the counts as Markdown and end")
    parser.add_argument("--first-seed", type=int, default=1, help="of a file that holds no counts yet")
    parser.add_argument("--batch", nargs=3, metavar=("CAMPAIGN", "COUNT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table(read(options.file)))
        return 0
    if options.batch:
        name, count, seed = options.batch
        return run_batch(name, int(count), int(seed), options.folder)
    return Soak(options).run()


def read(path: Path) -> dict[str, Any]:
    """The counts of a file; empty where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return dict(json.loads(path.read_text()))
    return {"campaigns": {}, "machines": []}


def table(record: dict[str, Any]) -> str:
    """Counts as Markdown."""
    from tests.faults.campaigns import CAMPAIGNS

    lines = [
        "| fault | injections | lost | duplicated | undecodable | differing | other failures |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, campaign in CAMPAIGNS.items():
        if found := record["campaigns"].get(name):
            numbers = [found["injections"], *(found[c] for c in COLUMNS), len(found["failures"])]
            lines.append(f"| {campaign.title} | {' | '.join(f'{n:,}' for n in numbers)} |")
    return "\n".join(lines)


def merge(record: dict[str, Any], name: str, counts: dict[str, Any]) -> None:
    """Add a batch's counts; of measured figures only what describes them is kept."""
    found = record["campaigns"].setdefault(name, {})
    for key in ("injections", "jobs", *COLUMNS):
        found[key] = found.get(key, 0) + counts[key]
    found["failures"] = [*found.get("failures", []), *counts["failures"]][:100]
    found["batches"] = found.get("batches", 0) + 1
    figures = found.setdefault("figures", {})
    for figure, values in counts["figures"].items():
        figures[figure] = sorted([*figures.get(figure, []), *values])[-2000:]


def machine() -> dict[str, Any]:
    """What the counts were found on."""
    import torch

    import vidkv
    from vidkv.planning import NUMERICS

    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vidkv": vidkv.__version__,
        "numerics": NUMERICS,
    }


def run_batch(name: str, count: int, seed: int, folder: Path) -> int:
    """One batch in this process; its counts go to a file beside its folder."""
    import dataclasses

    import torch

    from tests.faults.campaigns import CAMPAIGNS
    from tests.faults.oracle import Counts
    from vidkv.files import write_json

    torch.set_num_threads(1)
    begun = time.monotonic()
    try:
        counts = CAMPAIGNS[name].run(count, seed, folder)
    except Exception as error:
        import traceback

        traceback.print_exc()
        counts = Counts()
        counts.fail(f"seed {seed}: {type(error).__name__}: {error}")
    found = dataclasses.asdict(counts) | {"seconds": round(time.monotonic() - begun, 1)}
    write_json(folder / f"{name}-{seed}.json", found)
    return 0


@dataclass
class Batch:
    """A batch under way."""

    name: str
    count: int
    seed: int
    process: subprocess.Popen[bytes]
    until: float


class Soak:
    """Runs batches until the targets are reached or the time is over."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tests.faults.campaigns import CAMPAIGNS

        self.options, self.record = options, read(options.file)
        unknown = set(options.only or ()) - set(CAMPAIGNS)
        if unknown:
            sys.exit(f"unknown: {', '.join(sorted(unknown))}; campaigns are {', '.join(CAMPAIGNS)}")
        self.campaigns = {n: c for n, c in CAMPAIGNS.items() if not options.only or n in options.only}
        self.under_way: list[Batch] = []
        self.stopped = False
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        prepare(self.folder)
        here = machine()
        if here not in self.record["machines"]:
            self.record["machines"].append(here)
        deadline = time.monotonic() + 60 * self.options.minutes
        while not self.stopped:
            if time.monotonic() < deadline:
                while len(self.under_way) < self.options.jobs and self._start():
                    pass
            if not self.under_way:
                break
            time.sleep(0.2)
            self._collect()
        for batch in self.under_way:
            _kill(batch.process)
        print(table(self.record))
        wrong = [n for n in self.campaigns if _wrong(self.record["campaigns"].get(n))]
        if wrong:
            print(f"not clean: {', '.join(wrong)}", file=sys.stderr)
        return 1 if wrong else 0

    def _start(self) -> bool:
        """Begin the batch of the campaign that is furthest from its target; False where all are reached."""

        def share(name: str) -> float:
            made = self.record["campaigns"].get(name, {}).get("injections", 0)
            made += sum(batch.count for batch in self.under_way if batch.name == name)
            return made / self.campaigns[name].target

        name = min(self.campaigns, key=share)
        if share(name) >= 1:
            return False
        campaign = self.campaigns[name]
        found = self.record["campaigns"].setdefault(name, _nothing(self.options.first_seed))
        left = campaign.target - found["injections"]
        left -= sum(batch.count for batch in self.under_way if batch.name == name)
        count, seed = min(campaign.batch, max(1, left)), found["next_seed"]
        found["next_seed"] = seed + 1
        self._save()
        with (self.folder / f"{name}-{seed}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.soak", "--batch", name, str(count), str(seed),
                 "--folder", str(self.folder)],
                cwd=ROOT, env=environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        limit_s = 600 + 60 * min(count, 100)
        self.under_way.append(Batch(name, count, seed, process, time.monotonic() + limit_s))
        return True

    def _collect(self) -> None:
        for batch in list(self.under_way):
            if batch.process.poll() is None:
                if time.monotonic() < batch.until:
                    continue
                _kill(batch.process)
            self.under_way.remove(batch)
            path = self.folder / f"{batch.name}-{batch.seed}.json"
            try:
                counts = json.loads(path.read_text())
            except (OSError, ValueError):
                from dataclasses import asdict

                from tests.faults.oracle import Counts

                counts = asdict(Counts()) | {"seconds": 0.0}
                counts["failures"] = [f"seed {batch.seed}: no result, exit code {batch.process.returncode}"]
            merge(self.record, batch.name, counts)
            self._save()
            print(f"{batch.name} seed {batch.seed}: {_summary(counts)}", flush=True)
            if not _wrong(counts):
                self._tidy(batch)

    def _tidy(self, batch: Batch) -> None:
        """What a clean batch left; of another one it is kept."""
        shutil.rmtree(self.folder / f"{batch.name}-{batch.seed}", ignore_errors=True)
        for suffix in ("log", "json"):
            (self.folder / f"{batch.name}-{batch.seed}.{suffix}").unlink(missing_ok=True)

    def _save(self) -> None:
        from vidkv.files import write_json

        write_json(self.options.file, self.record)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = True


def prepare(folder: Path) -> None:
    """What all batches compare with, made once."""
    command = "from pathlib import Path; from tests.faults.oracle import prepare; prepare(Path({!r}))"
    subprocess.run(
        [sys.executable, "-c", command.format(str(folder))], cwd=ROOT, check=True,
        env=environment(),
    )  # fmt: skip


def _nothing(seed: int) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(("injections", "jobs", *COLUMNS, "batches"), 0)
    return empty | {"failures": [], "figures": {}, "next_seed": seed}


def _wrong(counts: dict[str, Any] | None) -> bool:
    return bool(counts) and bool(counts["failures"] or any(counts[column] for column in COLUMNS))


def _summary(counts: dict[str, Any]) -> str:
    text = f"{counts['injections']} injections, {counts['jobs']} jobs in {counts['seconds']:.0f} s"
    wrong = [f"{counts[column]} {column}" for column in COLUMNS if counts[column]] + counts["failures"]
    return f"{text}; {'; '.join(wrong) or 'all as it should be'}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
