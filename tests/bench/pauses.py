"""How long guests wait while something happens to their drives, over QMP of the same command line: the slowest writes that were in
flight while a snapshot or checkpoint of eight drives was taken, and reads beside a monitor that asks all the time."""

import json
import subprocess
import threading
import time

import images
import servers

PAUSES = ["snapshot", "checkpoint", "query"]

DRIVES = 8
TIMES = 12
# Of each drive.
WRITES_PER_SECOND = 150
QUERIES_PER_SECOND = 10000


def kinds(pause):
    """What is measured of each."""
    if pause == "query":
        return ["4 KiB reads beside 10000 query-block/s, of those without"]
    return ["99th percentile of the writes then, ms", "until it is taken, ms"]


def start(program, directory, paths, image_format):
    nodes = [
        {"driver": image_format, "node-name": f"drive{n}", "file": {"driver": "file", "filename": str(path)}}
        for n, path in enumerate(paths)
    ]
    server = servers.storage_daemon(directory, nodes, "drive0", "drive0", program=program)
    for n in range(1, len(paths)):
        name = f"drive{n}"
        server.qmp().run("block-export-add", type="nbd", id=name, node_name=name, name=name, writable=True)
    return server


def actions(pause, directory, turn, tops):
    """Of a transaction over all drives; `tops` are their top nodes, before and afterwards."""
    if pause == "checkpoint":
        name = f"checkpoint{turn}"
        return [{"type": "x-driveline-checkpoint-create", "data": {"name": name, "drives": list(tops)}}]
    made = []
    for n, top in enumerate(tops):
        tops[n] = f"drive{n}-{turn}"
        data = {"node-name": top, "snapshot-file": str(directory / tops[n]), "snapshot-node-name": tops[n]}
        made.append({"type": "blockdev-snapshot-sync", "data": data})
    return made


def writers(directory, socket, seconds):
    """fio that writes to all drives at a rate, and logs when each write ended and what it took."""
    lines = ["[global]", "ioengine=nbd", "rw=randwrite", "bs=4k", "size=1G", "iodepth=4", "time_based=1", "thread=1"]
    lines += [f"runtime={seconds}", f"rate_iops={WRITES_PER_SECOND}", "log_unix_epoch=1"]
    for n in range(DRIVES):
        lines += [f"[drive{n}]", f"uri=nbd+unix:///drive{n}?socket={socket}", f"write_lat_log={directory}/writes{n}"]
    (directory / "writers.fio").write_text("\n".join(lines))
    return subprocess.Popen(["fio", "writers.fio"], cwd=directory, stdout=subprocess.DEVNULL)


def ended(directory):
    """(second of its end, milliseconds) of each write."""
    for n in range(DRIVES):
        for line in (directory / f"writes{n}_lat.{n + 1}.log").read_text().splitlines():
            end, took, *_ = line.split(",")
            yield int(end) / 1e3, int(took) / 1e6


def percentile(values, percent):
    values = sorted(values)
    return values[min(len(values) - 1, len(values) * percent // 100)]


def taken(pause, server, directory):
    tops = [f"drive{n}" for n in range(DRIVES)]
    fio = writers(directory, server.socket, TIMES * 0.5 + 3)
    time.sleep(2)
    qmp, moments = server.qmp(), []
    for turn in range(TIMES):
        time.sleep(0.4)
        begin = time.time()
        qmp.run("transaction", actions=actions(pause, directory, turn, tops))
        moments.append((begin, time.time()))
    if fio.wait() != 0:
        raise RuntimeError("fio failed")
    # The log's time is in milliseconds.
    at_once = [
        took
        for end, took in ended(directory)
        if any(end >= begin and end - took / 1e3 <= until + 0.002 for begin, until in moments)
    ]
    return percentile(at_once, 99), percentile([1e3 * (until - begin) for begin, until in moments], 50)


def reads(server):
    command = ["fio", "--name=reads", "--ioengine=nbd", f"--uri=nbd+unix:///drive0?socket={server.socket}"]
    command += ["--rw=randread", "--bs=4k", "--size=256M", "--iodepth=16", "--time_based=1", "--runtime=3", "--output-format=json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out[out.index("{") :])["jobs"][0]["read"]["iops"]


def ask(qmp, until):
    """Asks at a rate, a hundredth of a second's worth at a time."""
    begin, asked = time.monotonic(), 0
    while not until.is_set():
        qmp.run_often("query-block", QUERIES_PER_SECOND // 100)
        asked += QUERIES_PER_SECOND // 100
        time.sleep(max(0, begin + asked / QUERIES_PER_SECOND - time.monotonic()))


def queried(server):
    alone = reads(server)
    until = threading.Event()
    asking = threading.Thread(target=ask, args=(server.qmp(), until))
    asking.start()
    try:
        return (reads(server) / alone,)
    finally:
        until.set()
        asking.join()


def measure(pause, program, directory):
    """Numbers, as `kinds` says."""
    paths = [directory / f"image{n}" for n in range(DRIVES)]
    image_format = "raw" if pause == "query" else "qcow2"
    try:
        for path in paths:
            images.tool("qemu-img", "create", "-f", image_format, path, 1 << 30)
        with start(program, directory, paths, image_format) as server:
            return queried(server) if pause == "query" else taken(pause, server, directory)
    finally:
        for path in [*paths, *directory.glob("drive*-*"), *directory.glob("writes*"), directory / "writers.fio"]:
            path.unlink(missing_ok=True)
