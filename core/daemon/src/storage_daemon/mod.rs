//! `driveline storage-daemon`: QEMU's qemu-storage-daemon by its command line.
//!
//! Each option is the call of a command, by the same code: `--blockdev` is `blockdev-add`, `--export` is `block-export-add`,
//! `--nbd-server` is `nbd-server-start`, `--object` is `object-add`. They are done in their order, and the first that fails
//! ends the program. Nobody is served before all are done. Source: QEMU's storage-daemon/qemu-storage-daemon.c.

mod arguments;
mod background;
mod chardev;
mod keyval;
mod trace;
mod typed;

use self::{
    arguments::{Given, Kind},
    background::{Background, PidFile},
    chardev::Chardevs,
};
use crate::{
    commands::{self, print, say},
    config::Config,
    daemon::Daemon,
    logging, notify,
};
use driveline_engine::signal::Signals;
use futures::future::{Either, select};
use serde_json::{Map, Value, json};
use std::{ffi::OsString, path::Path, pin::pin, process::ExitCode};

pub(crate) use background::CHILD;

/// The end of a program's name that makes it this one.
const NAME: &str = "storage-daemon";

const HELP: &str = "\
  -h, --help             print this and exit
  -T, --trace [[enable=]PATTERN][,events=FILE][,file=FILE]
                         log more: targets of Driveline (driveline::nbd) or QEMU's names of events (nbd_*); '-' before
                         one for less. events: a file with a pattern a line. file: where the log goes
  -V, --version          print the version and exit

  --blockdev [driver=]DRIVER[,node-name=NAME][,OPTION=VALUE...]
                         add a node, as blockdev-add does
  --chardev socket,id=ID,path=PATH[,abstract=on][,server=on][,wait=off][,reconnect=SECONDS]
  --chardev socket,id=ID,host=HOST,port=PORT[,server=on][,wait=off][,reconnect=SECONDS]
  --chardev socket,id=ID,fd=FD[,server=on][,wait=off]
  --chardev stdio,id=ID
  --chardev null,id=ID   a place for a monitor
  --daemonize            go to the background once everything is there
  --export [type=]nbd,id=ID,node-name=NODE[,name=NAME][,description=TEXT][,writable=on][,writethrough=on]
           [,iothread=ID][,bitmaps.N=NAME][,bitmaps.N.node=NODE,bitmaps.N.name=NAME][,allocation-depth=on]
                         serve a node, as block-export-add does; --nbd-server comes first
  --monitor [chardev=]ID[,mode=control][,pretty=on]
                         speak QMP there
  --nbd-server addr.type=unix,addr.path=PATH | addr.type=inet,addr.host=HOST,addr.port=PORT | addr.type=fd,addr.str=FD
               [,tls-creds=ID][,tls-authz=ID][,max-connections=N][,handshake-max-seconds=N]
                         start the NBD server, as nbd-server-start does
  --object TYPE,id=ID[,PROPERTY=VALUE...]
                         create an object, as object-add does; 'help' and 'TYPE,help' list types and properties
  --pidfile PATH         write the process' number to a file, once everything is there

Where --blockdev, --export, --monitor, --nbd-server and --object take key=value, JSON does as well. ',,' is a comma.
";

/// Whether a program of this name is the storage daemon; then how it is to be called in messages.
pub fn is_its_name(argv0: &Path) -> Option<String> {
    let name = argv0.file_name()?.to_str()?;
    name.ends_with(NAME).then(|| name.to_owned())
}

/// Does what the arguments say, and serves until a signal or a monitor ends it. `program` is its name in messages.
pub fn run(program: &str, arguments: Vec<OsString>) -> ExitCode {
    match start_and_serve(program, arguments) {
        Ok(code) => code,
        Err(message) => {
            commands::say_as(program, message);
            ExitCode::FAILURE
        }
    }
}

fn start_and_serve(program: &str, arguments: Vec<OsString>) -> Result<ExitCode, String> {
    let text = |argument: OsString| {
        argument.into_string().map_err(|argument| format!("{}: it is no UTF-8", argument.display()))
    };
    let arguments: Vec<String> = arguments.into_iter().map(text).collect::<Result<_, _>>()?;
    let (given, wrong) = arguments::parse(arguments);
    for option in &given {
        match option.kind {
            Kind::Help => {
                return Ok(print(&format!("Usage: {program} [options]\nA QEMU storage daemon\n\n{HELP}")));
            }
            Kind::Version => {
                let version = env!("CARGO_PKG_VERSION");
                return Ok(print(&format!(
                    "{program} version {version} (Driveline; as qemu-storage-daemon 10.0.2)\n"
                )));
            }
            _ => {}
        }
    }
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    let mut traces = trace::Traces::default();
    for option in given.iter().filter(|option| option.kind == Kind::Trace) {
        for warning in traces.add(&option.value).map_err(|error| format!("{}: {error}", option.text))? {
            commands::say_as(program, format_args!("{}: warning: {warning}", option.text));
        }
    }
    let daemonize = given.iter().any(|option| option.kind == Kind::Daemonize);
    if daemonize && !background::is_child() {
        return background::start_again();
    }
    let background = Background::enter(daemonize)?;
    logging::start_with(&traces.directives, traces.file)?;
    // Caught before anything is open, so that whatever was started is ended in order.
    let mut signals = Signals::terminate().map_err(|error| format!("cannot catch signals: {error}"))?;
    let (config, mistakes) = Config::parse(Path::new(NAME), "");
    let daemon = Daemon::start(&config, mistakes).map_err(|error| error.to_string())?;
    let mut starting = Starting {
        daemon: &daemon,
        signals: &mut signals,
        chardevs: Chardevs::new(daemonize),
        pidfile: None,
    };
    let started = starting.all(&given);
    let Starting { mut chardevs, pidfile, .. } = starting;
    let started = started.and_then(|done| match (done, pidfile) {
        (Done::All, Some(path)) => PidFile::write(&path).map(|file| (done, Some(file))),
        (done, _) => Ok((done, None)),
    });
    let (done, pidfile) = match started {
        Ok(started) => started,
        Err(message) => {
            if let Err(error) = daemon.stop() {
                tracing::error!("while closing: {error}");
            }
            return Err(message);
        }
    };
    let mut code = ExitCode::SUCCESS;
    if done == Done::All {
        daemon.to_tell().iter().for_each(say);
        let gone_on = until_signal(&daemon, &mut signals, daemon.inner().restart_jobs());
        if gone_on.is_none() {
            return daemon.stop().map(|()| code).map_err(|error| format!("while closing: {error}"));
        }
        daemon.interrupted().iter().for_each(say);
        let served = daemon.inner().let_in().map_err(|error| error.to_string());
        let stdio = chardevs.serve(&daemon);
        match served {
            Ok(()) => {
                background.ready();
                notify::tell("READY=1");
                tracing::info!("serving");
                code = commands::until_the_end(daemon, &mut signals);
            }
            Err(message) => {
                drop(daemon.stop());
                return Err(message);
            }
        }
        stdio.finish();
    } else if let Err(error) = daemon.stop() {
        return Err(format!("while closing: {error}"));
    }
    drop(pidfile);
    // As in `run`: one more signal does not kill a program at its end.
    std::mem::forget(signals);
    Ok(code)
}

/// How far the options went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// All were done.
    All,
    /// One asked for help, or a signal came: nothing is served.
    End,
}

/// What options work on, one after the other.
struct Starting<'a> {
    daemon: &'a Daemon,
    signals: &'a mut Signals,
    chardevs: Chardevs,
    pidfile: Option<std::path::PathBuf>,
}

impl Starting<'_> {
    fn all(&mut self, given: &[Given]) -> Result<Done, String> {
        self.daemon.inner().exports.hold();
        self.daemon.inner().journals.hold();
        for option in given {
            match self.one(option).map_err(|error| format!("{}: {error}", option.text))? {
                Done::All => {}
                Done::End => return Ok(Done::End),
            }
        }
        Ok(Done::All)
    }

    fn one(&mut self, option: &Given) -> Result<Done, String> {
        match option.kind {
            Kind::Blockdev => self.command("blockdev-add", read(&option.value, Some("driver"), true)?)?,
            Kind::Export => self.command("block-export-add", read(&option.value, Some("type"), false)?)?,
            Kind::NbdServer => {
                let arguments = legacy_address(read(&option.value, None, false)?);
                self.command("nbd-server-start", arguments)
                    .map_err(|text| text.replace("addr.data", "addr"))?;
            }
            Kind::Object => return self.object(&option.value),
            Kind::Chardev => {
                let is_there = self.chardevs.add(&option.value, self.daemon, self.signals)?;
                return Ok(if is_there { Done::All } else { Done::End });
            }
            Kind::Monitor => self.chardevs.monitor(read(&option.value, Some("chardev"), false)?)?,
            Kind::Pidfile => {
                let path = std::path::absolute(&option.value);
                self.pidfile = Some(path.map_err(|error| format!("cannot create PID file: {error}"))?);
            }
            Kind::Daemonize | Kind::Trace | Kind::Help | Kind::Version => {}
        }
        Ok(Done::All)
    }

    fn command(&mut self, name: &str, arguments: Map<String, Value>) -> Result<(), String> {
        let monitor = self.daemon.inner().monitor();
        let done = until_signal(self.daemon, self.signals, monitor.execute(name, arguments.into()));
        done.ok_or("a signal ended it")?.map(drop).map_err(|error| error.desc)
    }

    fn object(&mut self, text: &str) -> Result<Done, String> {
        let ask = |command: &str, arguments: Value| {
            self.daemon.execute(command, arguments).map_err(|error| error.desc)
        };
        let names = |value: &Value| -> Vec<(String, String)> {
            let text = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
            let entries = value.as_array().into_iter().flatten();
            let mut names: Vec<_> = entries.map(|entry| (text(entry, "name"), text(entry, "type"))).collect();
            names.sort();
            names
        };
        if ["help", "?"].contains(&text) {
            let types = names(&ask("qom-list-types", json!({ "implements": "user-creatable" }))?);
            let lines: String = types.iter().map(|(name, _)| format!("  {name}\n")).collect();
            print(&format!("List of user creatable objects:\n{lines}"));
            return Ok(Done::End);
        }
        if let Some(kind) = text.strip_suffix(",help").or_else(|| text.strip_suffix(",?")) {
            let properties = names(&ask("qom-list-properties", json!({ "typename": kind }))?);
            let properties = properties.iter().filter(|(name, _)| name != "type");
            let lines: String = properties.map(|(name, kind)| format!("  {name}=<{kind}>\n")).collect();
            print(&format!("{kind} options:\n{lines}"));
            return Ok(Done::End);
        }
        self.command("object-add", read(text, Some("qom-type"), false)?)?;
        Ok(Done::All)
    }
}

/// Does something that may wait for a server for ever. `None`: a signal came first.
fn until_signal<T: Send>(
    daemon: &Daemon,
    signals: &mut Signals,
    work: impl Future<Output = T> + Send,
) -> Option<T> {
    daemon.engine().block_on_local(|| async move {
        match select(pin!(work), pin!(signals.next())).await {
            Either::Left((done, _)) => Some(done),
            Either::Right(_) => None,
        }
    })
}

/// The arguments that an option says. Those in JSON have their types.
fn read(text: &str, implied: Option<&str>, guess: bool) -> Result<Map<String, Value>, String> {
    match keyval::parse(text, implied)? {
        (object, true) => typed::typed(object, guess),
        (object, false) => Ok(object),
    }
}

/// `--nbd-server` has the address in one piece, and `nbd-server-start` its type beside the rest.
fn legacy_address(mut arguments: Map<String, Value>) -> Map<String, Value> {
    if let Some(Value::Object(address)) = arguments.get_mut("addr")
        && let Some(kind) = address.shift_remove("type")
    {
        let rest = std::mem::take(address);
        address.insert("type".into(), kind);
        address.insert("data".into(), rest.into());
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_the_end_of_its_name() {
        let name = |path: &str| is_its_name(Path::new(path));
        assert_eq!(name("/usr/bin/qemu-storage-daemon").as_deref(), Some("qemu-storage-daemon"));
        assert_eq!(name("storage-daemon").as_deref(), Some("storage-daemon"));
        assert_eq!(name("/opt/storage-daemon/driveline"), None);
    }

    #[test]
    fn an_address_in_one_piece_becomes_the_commands() {
        let read = |text| Value::Object(legacy_address(read(text, None, false).unwrap()));
        let expected = json!({
            "addr": { "type": "unix", "data": { "path": "x" } }, "max-connections": 3,
        });
        assert_eq!(read("addr.type=unix,addr.path=x,max-connections=3"), expected);
        assert_eq!(read(r#"{"addr":{"type":"unix","path":"x"},"max-connections":3}"#), expected);
        assert_eq!(read("addr=x"), json!({ "addr": "x" }));
    }
}
