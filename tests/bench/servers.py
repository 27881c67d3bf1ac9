"""The programs that are compared: each serves one image over a unix socket, in a process of its own."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A running server; a context that ends it."""

    def __init__(self, command, directory, environment=None):
        self.directory = directory
        self.socket = directory / "disk.sock"
        self.monitor = directory / "qmp.sock"
        for path in (self.socket, self.monitor):
            path.unlink(missing_ok=True)
        self.log = open(directory / "server.log", "w+b")
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        try:
            self._connect(self.socket).close()
        except BaseException:
            self.end()
            raise

    def _connect(self, path):
        deadline = time.monotonic() + 20
        while True:
            stream = socket.socket(socket.AF_UNIX)
            try:
                stream.connect(str(path))
                return stream
            except OSError:
                stream.close()
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.log.seek(0)
                    raise RuntimeError(f"{self.process.args} does not serve: {self.log.read().decode()}")
            time.sleep(0.01)

    @property
    def uri(self):
        return f"nbd+unix:///disk?socket={self.socket}"

    def cpu_seconds(self):
        """What it has used of the processors so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS

    def resident_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise RuntimeError("no VmRSS")

    def qmp(self):
        return Qmp(self._connect(self.monitor))

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


class Qmp:
    """A QMP client of a few lines."""

    def __init__(self, stream):
        stream.settimeout(300)
        self.stream = stream.makefile("rw")
        self.events = []
        assert "QMP" in self._read()
        self.run("qmp_capabilities")

    def _read(self):
        line = self.stream.readline()
        if not line:
            raise RuntimeError("the monitor closed the connection")
        return json.loads(line)

    def run(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.stream.flush()
        return self._answer(command)

    def run_often(self, command, times):
        """Sends it so often at once. The answers are not parsed, which would cost more than to give them."""
        self.stream.write((json.dumps({"execute": command}) + "\n") * times)
        self.stream.flush()
        for _ in range(times):
            answer = self.stream.readline()
            if not answer.startswith('{"return"'):
                raise RuntimeError(f"{command}: {answer}")

    def _answer(self, command):
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
            else:
                return answer["return"]

    def wait(self, event):
        """The data of the next event of that name."""
        while True:
            for index, seen in enumerate(self.events):
                if seen["event"] == event:
                    return self.events.pop(index)["data"]
            self.events.append(self._read())


def driveline(program, directory, image, image_format, variant="plain"):
    """`variant` is what stands above the image: see `VARIANTS`."""
    bitmap, filters = VARIANTS[variant]
    lines = ["[node.image]", f'driver = "{image_format}"', f'file = "{image}"']
    root = "image"
    for index in range(5 if filters else 0):
        lines += [f"[node.filter{index}]", f'child = "{root}"', *filters]
        root = f"filter{index}"
    lines += ["[drive.disk]", f'root = "{root}"']
    if bitmap in DURABILITIES:
        # Each run begins with a clean bitmap.
        (directory / "bench.dlbitmaps").unlink(missing_ok=True)
        lines += ['bitmap-store = "file:bench.dlbitmaps"']
        lines += [f'bitmaps = [{{ name = "daily", granularity = "64KiB", durability = "{bitmap}" }}]']
    elif bitmap:
        lines += ['bitmaps = [{ name = "daily", granularity = "64KiB" }]']
    lines += ["[export.disk]", 'type = "nbd"', 'drive = "disk"', 'socket = "disk.sock"', "writable = true"]
    return run_driveline(program, directory, lines)


# A holder has no operation of its own, so that the path leads past it. `log` has all of them, and nobody listens to its level here.
VARIANTS = {
    "plain": (False, None),
    "bitmap": (True, None),
    "5 holders": (False, ['driver = "bitmap-holder"']),
    "5 passing": (False, ['driver = "log"', 'level = "trace"']),
}

# Persistent bitmaps, by what they survive.
DURABILITIES = ("volatile", "process", "power")
VARIANTS |= {durability: (durability, None) for durability in DURABILITIES}


def run_driveline(program, directory, lines):
    configuration = directory / "drive.toml"
    configuration.write_text("\n".join([*lines, "[monitor]", 'qmp = "qmp.sock"', ""]))
    return Server([program, "run", configuration], directory)


def storage_daemon(directory, blockdevs, node, export_name="disk", bitmap=None, program=("qemu-storage-daemon",)):
    """QEMU's storage daemon, or who takes its command line: one NBD export of `node`, and a monitor."""
    command = list(program)
    for blockdev in blockdevs:
        command += ["--blockdev", json.dumps(blockdev)]
    command += ["--nbd-server", "addr.type=unix,addr.path=disk.sock"]
    command += ["--export", f"type=nbd,id=disk,node-name={node},name={export_name},writable=on"]
    command += ["--chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off", "--monitor", "chardev=qmp"]
    server = Server(command, directory)
    if bitmap:
        server.qmp().run("block-dirty-bitmap-add", node=node, name=bitmap, granularity=65536)
    return server


def storage_daemon_image(directory, image, image_format, bitmap=None):
    file = {"driver": "file", "filename": str(image), "node-name": "file"}
    node = {"driver": image_format, "file": "file", "node-name": "image"}
    return storage_daemon(directory, [file, node], "image", bitmap=bitmap)


def nbdkit(directory, image):
    command = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", "disk.sock"]
    return Server([*command, "file", image], directory)
