"""Backup and mirror into another image, over QMP, of the same command line. Of a backup: seconds until the job is over, and until
the target is closed as well; qemu-storage-daemon leaves its data in the page cache, and the closing brings it to the disk. Of a
mirror: seconds until it is ready, and until it has taken the source's place."""

import random
import subprocess
import time

import images
import servers

COPIES = ["backup", "mirror", "incremental"]


def kinds(copy):
    """What is measured of each."""
    return ("until it is ready, s", "until it is over, s") if copy == "mirror" else ("until it is over, s", "until the target is closed, s")


# Of a sparse disk: one write of 4 KiB in so many granules of 64 KiB.
INCREMENTAL_BYTES = 64 << 30
WRITES = INCREMENTAL_BYTES // 65536 // 100


def start(program, directory, source, target, image_format):
    nodes = [
        {"driver": image_format, "node-name": name, "file": {"driver": "file", "filename": str(path)}}
        for name, path in (("source", source), ("target", target))
    ]
    return servers.storage_daemon(directory, nodes, "source", program=program)


def write_one_percent(server):
    server.qmp().run("block-dirty-bitmap-add", node="source", name="daily", granularity=65536)
    offsets = random.Random(1).sample(range(INCREMENTAL_BYTES // 65536), WRITES)
    lines = "".join(f"aio_write -q -P 7 {offset * 65536} 4k\n" for offset in offsets) + "aio_flush\n"
    command = ["qemu-io", "-t", "writeback", "-f", "raw", server.uri]
    subprocess.run(command, input=lines.encode(), check=True, stdout=subprocess.DEVNULL)


def seconds(copy, server):
    qmp = server.qmp()
    begin = time.monotonic()
    if copy == "mirror":
        qmp.run("blockdev-mirror", job_id="job", device="source", target="target", sync="full")
        qmp.wait("BLOCK_JOB_READY")
        ready = time.monotonic()
        qmp.run("block-job-complete", device="job")
    elif copy == "backup":
        qmp.run("blockdev-backup", job_id="job", device="source", target="target", sync="full")
    else:
        qmp.run("blockdev-backup", job_id="job", device="source", target="target", sync="incremental", bitmap="daily")
    end = qmp.wait("BLOCK_JOB_COMPLETED")
    if "error" in end:
        raise RuntimeError(f"{copy}: {end['error']}")
    over = time.monotonic()
    if copy == "mirror":
        return ready - begin, over - begin
    qmp.run("blockdev-del", node_name="target")
    return over - begin, time.monotonic() - begin


def measure(copy, program, directory, length):
    """Seconds, as `kinds` says."""
    image_format = "qcow2" if copy == "incremental" else "raw"
    length = INCREMENTAL_BYTES if copy == "incremental" else length
    source, target = directory / "source", directory / "target"
    try:
        for path in (source, target):
            images.tool("qemu-img", "create", "-f", image_format, path, length)
        if image_format == "raw":
            with open(source, "r+b") as file:
                block = random.Random(2).randbytes(1 << 20)
                for _ in range(length >> 20):
                    file.write(block)
        with start(program, directory, source, target, image_format) as server:
            if copy == "incremental":
                write_one_percent(server)
            subprocess.run(["sync"], check=True)
            return seconds(copy, server)
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
