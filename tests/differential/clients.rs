//! QEMU's own client and shell, as they are published.

use crate::harness::{Daemon, have};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The folder of programs of a Python environment that has `qemu.qmp`; `None`, said loudly, if it cannot be made (there may be no
/// network).
fn environment(folder: &Path) -> Option<PathBuf> {
    let made = Command::new("python3").args(["-m", "venv"]).arg(folder).output().ok()?;
    let programs = folder.join("bin");
    let pip = |name: &str| {
        let mut pip = Command::new(programs.join("pip"));
        pip.args([
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--retries",
            "1",
            "--timeout",
            "15",
            name,
        ]);
        pip.output().is_ok_and(|output| output.status.success())
    };
    if made.status.success() && pip("qemu.qmp") {
        return Some(programs);
    }
    eprintln!("SKIPPED: qemu.qmp cannot be installed");
    assert!(std::env::var_os("CI").is_none(), "in CI no test is skipped");
    None
}

const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main():
    qmp = QMPClient("test")
    with qmp.listener("JOB_STATUS_CHANGE") as listener:
        await qmp.connect(sys.argv[1])
        assert "oob" in qmp.greeting.QMP.capabilities
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 65536})
        nodes = await qmp.execute("query-named-block-nodes")
        assert [node["node-name"] for node in nodes] == ["n"], nodes
        await qmp.execute("block-dirty-bitmap-add", {"node": "n", "name": "b"})
        try:
            await qmp.execute("block-dirty-bitmap-add", {"node": "n", "name": "b"})
            assert False
        except ExecuteError as error:
            assert str(error) == "Bitmap already exists: b", error
        await qmp.execute("block-dirty-bitmap-remove", {"node": "n", "name": "b"})
        several = [qmp.execute("query-version") for _ in range(20)]
        assert len({str(v) for v in await asyncio.gather(*several)}) == 1
        schema = await qmp.execute("query-qmp-schema")
        assert any(entry["name"] == "blockdev-add" for entry in schema)
    await qmp.disconnect()

asyncio.run(main())
"#;

#[test]
fn the_client_and_the_shell_from_pypi_drive_a_daemon() {
    if !have("the_client_and_the_shell_from_pypi_drive_a_daemon", &["python3"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(programs) = environment(&folder.path().join("python")) else { return };
    let daemon = Daemon::start(folder.path(), "[monitor]\nqmp = \"qmp.sock\"\n");
    let socket = folder.path().join("qmp.sock");
    let client = Command::new(programs.join("python3")).args(["-c", SCRIPT]).arg(&socket).output().unwrap();
    assert!(client.status.success(), "{}", String::from_utf8_lossy(&client.stderr));

    let mut shell = Command::new(programs.join("qmp-shell"))
        .arg(&socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .env("HOME", folder.path())
        .spawn()
        .unwrap();
    shell.stdin.take().unwrap().write_all(b"blockdev-del node-name=n\nquery-block\n").unwrap();
    let output = shell.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Connected to QEMU 10.0.2"), "{text}");
    assert!(text.contains("{\"return\": {}}") && text.contains("{\"return\": []}"), "{text}");
    assert!(daemon.terminate().success());
}
