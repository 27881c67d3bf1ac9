#!/usr/bin/env python3
"""Measures Driveline beside qemu-storage-daemon and nbdkit, and prints a table with ratios.

    cargo build --release --workspace
    tests/bench/run.py                      # some ten minutes
    tests/bench/run.py --quick              # two minutes, rougher
    tests/bench/run.py --only jobs          # or: raw, qcow2, copies, pauses, memory, durability; and parts of a load's name

All servers take their turn on each load before the next round begins, so that what else the machine does meets all of
them; a number is the median of its rounds, and a ratio the median of the ratios within each round. Compare ratios, not
numbers, between machines or runs. Needs fio with the nbd engine, QEMU's tools and nbdkit; no packages of Python's.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import copies
import images
import jobs
import load
import pauses
import servers

# What is not Driveline.
OTHERS = ("qsd", "nbdkit")
ROOT = Path(__file__).resolve().parents[2]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/driveline")
    parser.add_argument("--directory", type=Path, help="where images are made; without it, the temporary folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="raw, qcow2, jobs, copies, pauses, memory, durability, parts of a load's name")
    parser.add_argument("--quick", action="store_true", help="small images, short runs")
    parser.add_argument("--against", nargs="+", metavar="NAME", help="of the table's columns; plain is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="of each fio run")
    parser.add_argument("--size", type=int, metavar="MiB", help="of the images that fio meets")
    parser.add_argument("--job-size", type=int, metavar="MiB", help="of the data that a job copies")
    parser.add_argument("--nice", type=int, default=0, help="run all with this niceness: below 0 on a busy machine")
    given = parser.parse_args()
    given.seconds = given.seconds or (1 if given.quick else 3)
    given.size = given.size or (64 if given.quick else 256)
    given.job_size = given.job_size or (256 if given.quick else 1024)
    given.program = given.program.resolve()
    return given


def wanted(given, what):
    """The words of `--only` that name a kind of `what`; all of them, if none does."""
    named = [one for one in what if any(word.lower() in str(one).lower() for word in given.only)]
    return named or list(what)


def median_ratio(over, under):
    """Of the ratios within a round: what disturbs a whole round is in both."""
    return statistics.median(a / b for a, b in zip(over, under))


def ratio(value):
    return f"{value:.2f}"


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def contenders(given, directory, image_format, paths):
    """{name: how it is started}; those of Driveline share an image, one after the other."""
    found = {}
    for variant in (variant for variant in servers.VARIANTS if variant not in servers.DURABILITIES):
        found[variant] = lambda variant=variant: servers.driveline(
            given.program, directory, paths["driveline"], image_format, variant
        )
    found["qsd"] = lambda: servers.storage_daemon_image(directory, paths["qsd"], image_format)
    if image_format == "raw":
        found["nbdkit"] = lambda: servers.nbdkit(directory, paths["nbdkit"])
    return {name: start for name, start in found.items() if not given.against or name in (*given.against, "plain")}


def measure_loads(given, directory, image_format):
    length = given.size << 20
    programs = ["driveline", "qsd"] + (["nbdkit"] if image_format == "raw" else [])
    paths = images.copies(directory, image_format, length, programs)
    against = contenders(given, directory, image_format, paths)
    names = {one.name: one for one in load.LOADS}
    print(f"### NBD, {image_format}\n")
    rows, processor = [], []
    for one in (names[name] for name in wanted(given, names)):
        rates = {name: [] for name in against}
        costs = {name: [] for name in against}
        for turn in range(given.rounds):
            # Another one begins each round, so that nobody always comes after the same one.
            order = list(against)[turn % len(against):] + list(against)[:turn % len(against)]
            for name in order:
                with against[name]() as server:
                    measured = load.run(one, server, length, given.seconds)
                rates[name].append(one.scale(measured.iops))
                costs[name].append(measured.cpu_us)
                print(f"{image_format} {one.name} {name}: {rates[name][-1]:.1f} {one.unit()}", file=sys.stderr)
            os.sync()
        plain = rates["plain"]
        row = [f"{one.name}, {one.unit()}"] + [f"{statistics.median(rates[name]):.1f}" for name in against]
        row += [ratio(median_ratio(plain, rates[name])) for name in OTHERS if name in against]
        row += [ratio(median_ratio(rates[name], plain)) for name in against if name not in (*OTHERS, "plain")]
        rows.append(row)
        cost = [f"{statistics.median(costs[name]):.1f}" for name in against]
        cost += [ratio(median_ratio(costs[name], costs["plain"])) for name in against if name != "plain"]
        processor.append([one.name, *cost])
    ratios = [f"plain ÷ {name}" for name in OTHERS if name in against]
    ratios += [f"{name} ÷ plain" for name in against if name not in (*OTHERS, "plain")]
    table(["load", *against, *ratios], rows)
    print("The server's processor time for each request, µs:\n")
    table(["load", *against, *(f"{name} ÷ plain" for name in against if name != "plain")], processor)
    for path in paths.values():
        path.unlink()


def measure_durability(given, directory):
    """Writes with a persistent bitmap of each durability, against one that is only saved at the end."""
    length = given.size << 20
    against = ("plain", *servers.DURABILITIES)
    names = {one.name: one for one in load.WRITES}
    for image_format in ("raw", "qcow2"):
        paths = images.copies(directory, image_format, length, ["driveline"])
        print(f"### Persistent bitmaps, {image_format}\n")
        rows = []
        for one in (names[name] for name in wanted(given, names)):
            rates = {name: [] for name in against}
            costs = {name: [] for name in against}
            for turn in range(given.rounds):
                for name in against[turn % len(against):] + against[:turn % len(against)]:
                    with servers.driveline(given.program, directory, paths["driveline"], image_format, name) as server:
                        measured = load.run(one, server, length, given.seconds)
                    rates[name].append(one.scale(measured.iops))
                    costs[name].append(measured.cpu_us)
                    print(f"{image_format} {one.name} {name}: {rates[name][-1]:.1f} {one.unit()}", file=sys.stderr)
                os.sync()
            row = [f"{one.name}, {one.unit()}"] + [f"{statistics.median(rates[name]):.1f}" for name in against]
            row += [ratio(median_ratio(rates[name], rates["volatile"])) for name in ("plain", "process", "power")]
            row += [f"{statistics.median(costs[name]):.1f}" for name in against]
            rows.append(row)
        ratios = [f"{name} ÷ volatile" for name in ("plain", "process", "power")]
        table(["load", *against, *ratios, *(f"{name}, µs" for name in against)], rows)
        for path in paths.values():
            path.unlink()


def side_by_side(given, of, measure, kinds, against, digits, fewer_is_better):
    """Driveline and qemu-storage-daemon take turns at each of `of`; `measure` gives a value for each of its `kinds`."""
    rows = []
    images.touch_free_memory()
    for one in of:
        measured = {kind: {name: [] for name in against} for kind in kinds(one)}
        for turn in range(given.rounds):
            for name in sorted(against, reverse=turn % 2 == 1):
                for kind, value in zip(measured, measure(one, against[name])):
                    measured[kind][name].append(value)
                    print(f"{one} {name} {kind}: {value:.{digits}f}", file=sys.stderr)
                os.sync()
        for kind, values in measured.items():
            medians = [f"{statistics.median(values[name]):.{digits}f}" for name in against]
            over, under = ("qsd", "driveline") if fewer_is_better else ("driveline", "qsd")
            rows.append([f"{one}, {kind}", *medians, ratio(median_ratio(values[over], values[under]))])
    return rows


def measure_jobs(given, directory):
    length = given.job_size << 20
    against = {
        "driveline": lambda paths: jobs.driveline(given.program, directory, paths),
        "qsd": lambda paths: jobs.storage_daemon(directory, paths),
    }
    print(f"### Jobs, {given.job_size} MiB, qcow2 to qcow2\n")
    kinds = ("copied, MiB/s", "completed, MiB/s", "processor time, µs for each MiB")
    rows = side_by_side(
        given, wanted(given, jobs.JOBS), lambda job, start: jobs.measure(job, directory, length, start),
        lambda _: kinds, against, digits=0, fewer_is_better=False,
    )
    table(["job", *against, "driveline ÷ qsd"], rows)


def measure_copies(given, directory):
    """Backup and mirror: seconds, of which fewer are better, so the ratio is the other way round."""
    length = given.size << 20
    against = {"driveline": [given.program, "storage-daemon"], "qsd": ["qemu-storage-daemon"]}
    print(f"### Copies: {given.size} MiB of raw; 1 % of a sparse qcow2 image of 64 GiB\n")
    rows = side_by_side(
        given, wanted(given, copies.COPIES), lambda copy, program: copies.measure(copy, program, directory, length),
        copies.kinds, against, digits=3, fewer_is_better=True,
    )
    table(["copy", *against, "qsd ÷ driveline"], rows)


def measure_pauses(given, directory):
    """The writes that wait, and reads beside questions; only Driveline has checkpoints."""
    against = {"driveline": [given.program, "storage-daemon"], "qsd": ["qemu-storage-daemon"]}
    print(f"### Pauses: {pauses.DRIVES} qcow2 drives, {pauses.DRIVES * pauses.WRITES_PER_SECOND} writes of 4 KiB a second\n")
    of = wanted(given, pauses.PAUSES)
    measure = lambda pause, program: pauses.measure(pause, program, directory)
    rows = []
    for names, fewer_is_better in ((["snapshot"], True), (["query"], False)):
        names = [name for name in names if name in of]
        rows += side_by_side(
            given, names, measure, pauses.kinds, against, digits=2, fewer_is_better=fewer_is_better
        )
    if "checkpoint" in of:
        rounds = [measure("checkpoint", against["driveline"]) for _ in range(given.rounds)]
        for kind, values in zip(pauses.kinds("checkpoint"), zip(*rounds)):
            rows.append([f"checkpoint, {kind}", f"{statistics.median(values):.2f}", "", ""])
    table(["pause", *against, "times better"], rows)


def measure_memory(given, directory):
    """What the daemon takes with the graph of README's example, idle."""
    chain = images.chain(directory, "idle", 16 << 20, "base")
    lines = ["[node.base]", 'driver = "qcow2"', f'file = "{chain["base"]}"', "read-only = true"]
    lines += ["[node.active]", 'driver = "qcow2"', 'backing = "base"']
    lines += [f'file = {{ driver = "file", path = "{chain["top"]}", cache = "writeback" }}']
    lines += ["[node.limit]", 'driver = "throttle"', 'child = "active"', "iops = 50000"]
    lines += ["[drive.disk]", 'root = "limit"', 'bitmaps = [{ name = "daily", granularity = "64KiB" }]']
    lines += ["[export.disk]", 'type = "nbd"', 'drive = "disk"', 'socket = "disk.sock"', "writable = true"]
    lines += ['bitmaps = ["daily"]']
    with servers.run_driveline(given.program, directory, lines) as server:
        at_start = server.resident_bytes()
        load.run(load.LOADS[3], server, 16 << 20, 1)
        after = server.resident_bytes()
    print("### Memory\n")
    mebibytes = [f"{value / (1 << 20):.1f}" for value in (at_start, after)]
    table(["resident, MiB", "at start", "after a second of writes at depth 32"], [["qcow2 chain, throttle, bitmap", *mebibytes]])


PARTS = {
    "raw": lambda given, directory: measure_loads(given, directory, "raw"),
    "qcow2": lambda given, directory: measure_loads(given, directory, "qcow2"),
    "jobs": measure_jobs,
    "copies": measure_copies,
    "pauses": measure_pauses,
    "memory": measure_memory,
    "durability": measure_durability,
}


def parts(given):
    words = " ".join(given.only).lower().split()
    named = [part for part in PARTS if part in words]
    if any(job in words for job in jobs.JOBS):
        named.append("jobs")
    if any(copy in words for copy in copies.COPIES):
        named.append("copies")
    if any(pause in words for pause in pauses.PAUSES):
        named.append("pauses")
    return named or list(PARTS)


def main():
    given = arguments()
    tools = ["fio", "qemu-storage-daemon", "qemu-img", "nbdkit"]
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing or not given.program.exists():
        sys.exit(f"needed and not there: {', '.join(missing or [str(given.program)])}")
    if given.nice:
        os.nice(given.nice)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="driveline-bench-", dir=given.directory) as directory:
        for part in parts(given):
            PARTS[part](given, Path(directory))
    print(
        f"{os.cpu_count()} processors, Linux {platform.release()}; {given.rounds} rounds of {given.seconds:g} s, images of"
        f" {given.size} MiB in the page cache; load of the machine {load_before:.1f} before, {os.getloadavg()[0]:.1f} after."
    )


if __name__ == "__main__":
    main()
