"""Images that all servers get alike.

A file that is written in one go gets folios of megabytes, and ext4 then walks through all blocks of a folio for each
write of 4 KiB, which takes several times as long as the write. So every image is copied in pieces of 4 KiB, from its
end: what is measured is the server, not the history of its file. Each server has a copy of its own.
"""

import mmap
import os
import subprocess
from pathlib import Path

PIECE = 4096


def tool(*command):
    """Runs a tool that must succeed."""
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def scatter(source, target):
    """Copies a file in small pieces, from its end."""
    length = os.path.getsize(source)
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        writer.truncate(length)
        for offset in range((length - 1) // PIECE * PIECE, -1, -PIECE):
            os.pwrite(writer.fileno(), os.pread(reader.fileno(), PIECE, offset), offset)
        os.fsync(writer.fileno())


def touch_free_memory():
    """Uses most of the free memory once.

    In a virtual machine the host may have to find each page at its first use, which takes several times as long as
    copying to it: then what is measured is who comes to use memory that was used before.
    """
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemFree:"))
    with mmap.mmap(-1, max(int(free.split()[1]) * 1024 * 9 // 10, PIECE) // PIECE * PIECE) as memory:
        for offset in range(0, len(memory), PIECE):
            memory[offset] = 1


def random_file(path, length):
    """A raw file of data that nothing can compress, or take for zeroes."""
    with open(path, "wb") as file:
        for _ in range(length >> 20):
            file.write(os.urandom(1 << 20))


def copies(directory, image_format, length, servers):
    """One full image for each server: {server: path}."""
    template = directory / f"template.{image_format}"
    raw = directory / "template.raw"
    if not raw.exists():
        random_file(raw, length)
    if image_format != "raw":
        tool("qemu-img", "convert", "-f", "raw", "-O", image_format, raw, template)
    paths = {}
    for server in servers:
        paths[server] = directory / f"{server}.{image_format}"
        scatter(template, paths[server])
    return paths


def chain(directory, name, length, data_in):
    """A qcow2 chain of two, base and top, with all data in one of them: {layer: path}."""
    paths = {layer: directory / f"{name}-{layer}.qcow2" for layer in ("base", "top")}
    backing = ("-b", paths["base"], "-F", "qcow2")
    tool("qemu-img", "create", "-f", "qcow2", paths["base"], length)
    tool("qemu-img", "create", "-f", "qcow2", *backing, paths["top"])
    fill = directory / f"fill-{length}.raw"
    if not fill.exists():
        random_file(fill, length)
    # -n: into the image as it is, so that a top keeps its backing file.
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", fill, paths[data_in])
    with open(paths[data_in], "rb") as file:
        os.fsync(file.fileno())
    return paths
