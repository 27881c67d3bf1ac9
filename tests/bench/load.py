"""What clients do: fio's nbd engine, one connection."""

import json
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    name: str
    rw: str
    block: int
    depth: int

    def unit(self):
        return "kIOPS" if self.block == 4096 else "MiB/s"

    def scale(self, iops):
        return iops / 1000 if self.block == 4096 else iops * self.block / (1 << 20)


LOADS = [
    Load("4 KiB random read, depth 1", "randread", 4096, 1),
    Load("4 KiB random read, depth 32", "randread", 4096, 32),
    Load("4 KiB random write, depth 1", "randwrite", 4096, 1),
    Load("4 KiB random write, depth 32", "randwrite", 4096, 32),
    Load("256 KiB sequential read, depth 8", "read", 256 << 10, 8),
    Load("256 KiB sequential write, depth 8", "write", 256 << 10, 8),
]


# What a bitmap costs depends on how often a write is the first one to its granule.
WRITES = [
    Load("4 KiB random write, depth 1", "randwrite", 4096, 1),
    Load("4 KiB random write, depth 32", "randwrite", 4096, 32),
    Load("4 KiB sequential write, depth 1", "write", 4096, 1),
    Load("4 KiB sequential write, depth 32", "write", 4096, 32),
]


@dataclass
class Measured:
    iops: float
    # The server's time on the processors for each request: what a busy machine disturbs least.
    cpu_us: float


def run(load, server, length, seconds):
    command = [
        "fio",
        "--name=load",
        "--ioengine=nbd",
        f"--uri={server.uri}",
        f"--rw={load.rw}",
        f"--bs={load.block}",
        f"--iodepth={load.depth}",
        f"--size={length}",
        "--time_based",
        f"--runtime={seconds}",
        "--norandommap",
        "--output-format=json",
    ]
    before = server.cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"fio: {done.stderr}{done.stdout}")
    spent = server.cpu_seconds() - before
    report = json.loads(done.stdout[done.stdout.index("{"):])
    job = report["jobs"][0]["read" if load.rw.endswith("read") else "write"]
    return Measured(job["iops"], spent * 1e6 / max(job["total_ios"], 1))
