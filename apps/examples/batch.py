"""Make one prompt with many seeds as jobs that survive whatever happens to this process.

python apps/examples/batch.py --out renders --seconds 10 --seeds 1 2 3

Stop it and run it again: what is finished is skipped, and what is not goes on where it stopped.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vidkv.jobs.store import JobStore
from vidkv.jobs.supervisor import work_off
from vidkv.request import VideoRequest

PROMPT = "a green triangle bouncing behind a bar"


def main(out: Path, seconds: float, seeds: list[int], cache: str) -> None:
    with JobStore(out) as store, ThreadPoolExecutor(1) as pool:
        requests = [
            VideoRequest.of(
                {"prompt": PROMPT, "seconds": seconds, "seed": seed, "cache": cache, "id": f"seed-{seed}"}
            )
            for seed in seeds
        ]
        jobs = [store.submit(request, again=True) for request in requests]
        # in this process; `vidkv render` or `vidkv serve` on the same folder would do them as well
        working = pool.submit(work_off, store)
        for job in jobs:
            for now in store.watch(job.id):
                print(f"{now.id}: {now.state}, {now.done} of {now.chunks} chunks", flush=True)
            print(f"{job.id}: {store.file(job)}" if now.error is None else f"{job.id}: {now.error}")
        working.result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make one prompt with many seeds.")
    parser.add_argument("--out", type=Path, default=Path("renders"))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cache", default="int8,window=21,sink=3")
    main(**vars(parser.parse_args()))
