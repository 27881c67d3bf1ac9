"""Stream and commit of a qcow2 chain, from page cache to page cache, over QMP."""

import time

import images
import servers

JOBS = ["stream", "commit"]


def nodes(paths):
    """A chain of two as `--blockdev` takes it; driveline's graph is the same."""
    file = {layer: {"driver": "file", "filename": str(path)} for layer, path in paths.items()}
    base = {"driver": "qcow2", "node-name": "base", "file": file["base"], "read-only": True}
    top = {"driver": "qcow2", "node-name": "top", "file": file["top"], "backing": "base"}
    return [base, top]


def driveline(program, directory, paths):
    lines = ["[node.base]", 'driver = "qcow2"', f'file = "{paths["base"]}"', "read-only = true"]
    lines += ["[node.top]", 'driver = "qcow2"', f'file = "{paths["top"]}"', 'backing = "base"']
    lines += ["[drive.disk]", 'root = "top"']
    lines += ["[export.disk]", 'type = "nbd"', 'drive = "disk"', 'socket = "disk.sock"']
    return servers.run_driveline(program, directory, lines)


def storage_daemon(directory, paths):
    return servers.storage_daemon(directory, nodes(paths), "top")


def seconds(job, server):
    """How long the copying takes, and all of it: at the end Driveline brings the data to the disk, as the layers that it
    came from are about to go, and the storage daemon leaves a stream's data in the page cache."""
    qmp = server.qmp()
    begin = time.monotonic()
    if job == "stream":
        qmp.run("block-stream", job_id="job", device="top", auto_finalize=False)
        while qmp.wait("JOB_STATUS_CHANGE")["status"] != "pending":
            pass
        copied = time.monotonic()
        qmp.run("job-finalize", id="job")
    else:
        qmp.run("block-commit", job_id="job", device="top")
        qmp.wait("BLOCK_JOB_READY")
        copied = time.monotonic()
        qmp.run("block-job-complete", device="job")
    end = qmp.wait("BLOCK_JOB_COMPLETED")
    if "error" in end:
        raise RuntimeError(f"{job}: {end['error']}")
    return copied - begin, time.monotonic() - begin


def measure(job, directory, length, start):
    """Of one run on a fresh chain: MiB/s copied, MiB/s to the end, and the server's processor time for each MiB, in µs.
    `start(paths)` runs the server."""
    paths = images.chain(directory, job, length, "base" if job == "stream" else "top")
    mebibytes = length >> 20
    try:
        with start(paths) as server:
            copied, completed = seconds(job, server)
            cpu_us = server.cpu_seconds() * 1e6
        images.tool("qemu-img", "check", paths["top" if job == "stream" else "base"])
        return mebibytes / copied, mebibytes / completed, cpu_us / mebibytes
    finally:
        for path in paths.values():
            path.unlink()
