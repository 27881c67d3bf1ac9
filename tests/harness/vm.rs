//! A guest: a small Linux under an emulator, with a drive of Driveline's as its disk and a shell on its console.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// What a guest is made of: see `tests/vm/fetch`.
struct Parts {
    root: PathBuf,
    modules: PathBuf,
    kernel: PathBuf,
}

/// Kernel modules that find the disk, in the order of loading.
const MODULES: [&str; 6] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
];

/// What the guest runs: each line of its console is a command, and the end of each is told.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    insmod /modules/$module.ko
done
stty -echo
echo GUEST-READY
while read -r line; do
    eval \"$line\"
    echo \"GUEST-DONE $?\"
done
poweroff -f
";

/// A running guest. Its disk is `/dev/vda`.
pub(crate) struct Vm {
    child: Child,
    console: BufReader<ChildStdout>,
    keys: ChildStdin,
}

impl Vm {
    /// Is there what a guest needs? A test without it says so and passes; in CI it fails.
    pub(crate) fn have(test: &str) -> bool {
        if Parts::find().is_some() {
            return true;
        }
        eprintln!("SKIPPED {test}: no guest; tests/vm/fetch brings one");
        assert!(std::env::var_os("CI").is_none(), "in CI no test is skipped: tests/vm/fetch has not run");
        false
    }

    /// Boots a guest whose disk is what `disk` names: an address of NBD, or a file of raw data.
    pub(crate) fn boot(folder: &Path, disk: &str) -> Self {
        let parts = Parts::find().expect("asked for by Vm::have");
        let initrd = folder.join("initrd");
        fs::write(&initrd, parts.initrd()).unwrap();
        let share = parts.root.join("usr/share");
        let mut command = Command::new(parts.root.join("usr/bin/qemu-system-x86_64"));
        command.env("LD_LIBRARY_PATH", parts.root.join("usr/lib/x86_64-linux-gnu"));
        command.arg("-L").arg(share.join("qemu")).arg("-L").arg(share.join("seabios"));
        command.args("-accel tcg -m 192 -nodefaults -no-user-config -no-reboot -display none".split(' '));
        command.args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"]);
        command.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&initrd);
        command.arg("-drive").arg(format!("file={disk},format=raw,if=virtio,discard=unmap"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let (console, keys) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
        let mut vm = Self { child, console: BufReader::new(console), keys };
        vm.until("GUEST-READY");
        vm
    }

    /// Runs a command in the guest's shell, and returns what it printed. It must succeed.
    pub(crate) fn run(&mut self, command: &str) -> String {
        writeln!(self.keys, "{command}").expect("the guest runs");
        let (printed, end) = self.until("GUEST-DONE");
        assert_eq!(end, "0", "{command} in the guest: {printed}");
        printed
    }

    /// Ends the guest as its own command does.
    pub(crate) fn power_off(mut self) {
        writeln!(self.keys, "poweroff -f").expect("the guest runs");
        assert!(self.child.wait().unwrap().success(), "the guest ends by itself");
    }

    /// What the console shows until a mark, and what follows on its line.
    fn until(&mut self, mark: &str) -> (String, String) {
        let mut printed = String::new();
        loop {
            let mut line = String::new();
            let length = self.console.read_line(&mut line).expect("the console shows text");
            assert!(length > 0, "the guest has ended: {printed}");
            if let Some(rest) = line.trim_end().strip_prefix(mark) {
                return (printed, rest.trim().to_owned());
            }
            printed.push_str(line.trim_end());
            printed.push('\n');
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Parts {
    fn find() -> Option<Self> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let into = std::env::var_os("DRIVELINE_VM").map(PathBuf::from);
        let into = into.unwrap_or_else(|| workspace.join("target/vm"));
        if !into.join("complete").exists() {
            return None;
        }
        let root = into.join("root");
        let only = |folder: &str, begins: &str| {
            let entries = fs::read_dir(root.join(folder)).ok()?.map_while(Result::ok);
            let mut paths = entries.map(|entry| entry.path());
            paths.find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(begins)))
        };
        let (modules, kernel) = (only("lib/modules", "")?.join("kernel"), only("boot", "vmlinuz")?);
        Some(Self { root, modules, kernel })
    }

    /// Its first file system, in the one format that the kernel takes: cpio's `newc`.
    fn initrd(&self) -> Vec<u8> {
        let mut archive = Cpio::default();
        for folder in ["bin", "dev", "proc", "sys", "mnt", "modules"] {
            archive.entry(folder, 0o40755, &[]);
        }
        archive.entry("bin/busybox", 0o100755, &fs::read(self.root.join("bin/busybox")).unwrap());
        for module in MODULES {
            let name = format!("modules/{}.ko", module.rsplit('/').next().unwrap());
            archive.entry(&name, 0o100644, &fs::read(self.modules.join(format!("{module}.ko"))).unwrap());
        }
        archive.entry("init", 0o100755, INIT.as_bytes());
        archive.entry("TRAILER!!!", 0, &[]);
        archive.bytes
    }
}

/// An archive in the making. Source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: usize,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: usize, data: &[u8]) {
        self.entries += 1;
        let fields = [self.entries, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        self.bytes.extend(b"070701");
        fields.iter().for_each(|field| self.bytes.extend(format!("{field:08x}").as_bytes()));
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
