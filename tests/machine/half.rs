//! The machine's half: what a tool for virtual machines asks of one that a storage daemon has not. It is a monitor that answers a few
//! commands as a machine does and hands on all the others as they are, an agent in the guest, and a device with the guest's disk.
//!
//! | asked | what happens |
//! |---|---|
//! | `query-status`, `query-name`, `query-tpm` | the answer of a running machine without a name or a TPM |
//! | `query-block` | the daemon's answer, in which the drive is the device's |
//! | `qom-set` of the device's `drive` | its export is taken away and comes again over that node; the guest notices nothing |
//! | `guest-fsfreeze-freeze` and `-thaw` | the guest stops between two writes: that is the moment of a backup; and goes on |

use crate::harness::{Daemon, Guest, Moment, Qmp, Writer, run};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

const CONFIGURATION: &str = r#"
[node.disk]
driver = "qcow2"
file = "disk.qcow2"

[drive.vda]
root = "disk"

[monitor]
qmp = "qmp.sock"
"#;

/// Where a machine has the device.
const DEVICE: &str = "/machine/peripheral/disk0/virtio-backend";

/// A machine whose only disk is the daemon's drive.
pub(super) struct Machine {
    daemon: Daemon,
    inside: Arc<Inside>,
}

/// What the threads of its sockets share.
struct Inside {
    folder: PathBuf,
    writer: Writer,
    /// Of the last freeze.
    moment: Mutex<Option<Moment>>,
}

impl Machine {
    /// Boots it with an empty disk of that many bytes.
    pub(super) fn start(folder: &Path, size: usize) -> Self {
        let image = folder.join("disk.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), &size.to_string()]);
        let daemon = Daemon::start(folder, CONFIGURATION);
        let mut qmp = daemon.qmp();
        let address = json!({ "type": "unix", "data": { "path": folder.join("nbd.sock") } });
        qmp.run("nbd-server-start", json!({ "addr": address }));
        qmp.run("block-export-add", export("vda"));
        let guest = Guest::connect(&folder.join("nbd.sock"), "device");
        let writer = Writer::start(guest, vec![0; size]);
        let inside = Arc::new(Inside { folder: folder.to_owned(), writer, moment: Mutex::new(None) });
        let machine = Self { daemon, inside };
        serve(&machine.monitor(), machine.inside.clone(), Inside::monitor);
        serve(&machine.agent(), machine.inside.clone(), Inside::agent);
        machine
    }

    /// The socket of its monitor.
    pub(super) fn monitor(&self) -> PathBuf {
        self.inside.folder.join("machine.sock")
    }

    /// The socket of the agent in its guest.
    pub(super) fn agent(&self) -> PathBuf {
        self.inside.folder.join("agent.sock")
    }

    pub(super) fn writer(&self) -> &Writer {
        &self.inside.writer
    }

    /// What the guest had when it was frozen the last time.
    pub(super) fn moment(&self) -> Moment {
        self.inside.moment.lock().unwrap().take().expect("a backup freezes the guest")
    }

    pub(super) fn assert_guest_is_right(&self) {
        let mut disk = self.writer().pause();
        let size = disk.bytes.len() as u32;
        let read = disk.guest.as_mut().unwrap().read(0, size).unwrap();
        assert!(read == disk.bytes, "the guest has what it wrote");
    }

    /// Switches it off; the image is sound.
    pub(super) fn end(self) {
        let mut disk = self.writer().freeze(true);
        disk.guest.take();
        drop(disk);
        assert!(self.daemon.terminate().success());
        let image = self.inside.folder.join("disk.qcow2");
        run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    }
}

/// The device's disk, over a node.
fn export(node: &str) -> Value {
    json!({ "type": "nbd", "id": "device", "name": "device", "node-name": node, "writable": true })
}

/// Serves a socket, each client in a thread, until the program ends.
fn serve(socket: &Path, inside: Arc<Inside>, client: fn(&Inside, UnixStream) -> std::io::Result<()>) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let inside = inside.clone();
            std::thread::spawn(move || client(&inside, stream?));
        }
    });
}

impl Inside {
    /// What a machine says itself; `None`: the daemon is asked.
    fn answer(&self, command: &Value) -> Option<Result<Value, Value>> {
        let answer = match command["execute"].as_str()? {
            "query-status" => json!({ "running": true, "status": "running" }),
            "query-name" => json!({}),
            "query-tpm" => json!([]),
            "qom-set" if command["arguments"]["path"] == DEVICE => {
                return Some(self.plug(command["arguments"]["value"].as_str()?).map(|()| json!({})));
            }
            _ => return None,
        };
        Some(Ok(answer))
    }

    /// Plugs the device into another node, between two writes.
    fn plug(&self, node: &str) -> Result<(), Value> {
        let mut disk = self.writer.pause();
        disk.guest.take();
        let mut qmp = Qmp::connect(&self.folder.join("qmp.sock"));
        qmp.try_run("block-export-del", json!({ "id": "device", "mode": "hard" }))?;
        qmp.wait_event("BLOCK_EXPORT_DELETED", "device");
        qmp.try_run("block-export-add", export(node))?;
        disk.guest = Some(Guest::connect(&self.folder.join("nbd.sock"), "device"));
        Ok(())
    }

    /// A client of the monitor.
    fn monitor(&self, client: UnixStream) -> std::io::Result<()> {
        let daemon = UnixStream::connect(self.folder.join("qmp.sock"))?;
        let to_client = Mutex::new(client.try_clone()?);
        let say = |value: &Value| to_client.lock().unwrap().write_all(format!("{value}\n").as_bytes());
        // Ids of `query-block`, of which some client gives none.
        let asked: Mutex<Vec<Value>> = Mutex::default();
        std::thread::scope(|scope| {
            scope.spawn(|| -> std::io::Result<()> {
                for line in BufReader::new(&daemon).lines() {
                    let mut said: Value = serde_json::from_str(&line?)?;
                    let mut asked = asked.lock().unwrap();
                    if said.get("return").is_some()
                        && let Some(at) = asked.iter().position(|id| *id == said["id"])
                    {
                        asked.remove(at);
                        said["return"][0]["qdev"] = DEVICE.into();
                    }
                    drop(asked);
                    say(&said)?;
                }
                client.shutdown(Shutdown::Both)
            });
            // Some clients end no line.
            for command in serde_json::Deserializer::from_reader(BufReader::new(&client)).into_iter::<Value>()
            {
                let command = command?;
                let answer = match self.answer(&command) {
                    Some(Ok(answer)) => json!({ "return": answer, "id": command["id"] }),
                    Some(Err(error)) => json!({ "error": error, "id": command["id"] }),
                    None => {
                        if command["execute"] == "query-block" {
                            asked.lock().unwrap().push(command["id"].clone());
                        }
                        writeln!(&daemon, "{command}")?;
                        continue;
                    }
                };
                say(&answer)?;
            }
            daemon.shutdown(Shutdown::Both)
        })
    }

    /// A client of the agent. It ends no line.
    fn agent(&self, client: UnixStream) -> std::io::Result<()> {
        for command in serde_json::Deserializer::from_reader(BufReader::new(&client)).into_iter::<Value>() {
            let command = command?;
            let answer = match command["execute"].as_str().unwrap_or_default() {
                "guest-ping" => json!({}),
                "guest-sync" => command["arguments"]["id"].clone(),
                "guest-info" => {
                    let names = ["guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];
                    json!({ "supported_commands": names.map(|name| json!({ "name": name, "enabled": true })) })
                }
                "guest-fsfreeze-status" => {
                    if self.writer.pause().frozen {
                        json!("frozen")
                    } else {
                        json!("thawed")
                    }
                }
                "guest-fsfreeze-freeze" => {
                    *self.moment.lock().unwrap() = Some(self.writer.freeze(true).moment());
                    json!(1)
                }
                "guest-fsfreeze-thaw" => {
                    drop(self.writer.freeze(false));
                    json!(1)
                }
                other => panic!("the agent knows no {other}"),
            };
            writeln!(&client, "{}", json!({ "return": answer }))?;
        }
        Ok(())
    }
}
