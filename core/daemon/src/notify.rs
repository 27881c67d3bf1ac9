//! What systemd hands to a service, and wants to hear from it.
//! Source: sd_notify(3) and sd_listen_fds(3), which are stable interfaces.

use driveline_engine::{inherited, net::Listener};
use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// The first descriptor that is passed.
const FIRST_FD: i32 = 3;

/// Tells whoever started the program about it, if they want to know: `READY=1`, `STOPPING=1`, `STATUS=text`, one a line.
///
/// A manager that cannot be told is no reason to stop.
pub fn tell(state: &str) {
    let Some(place) = env::var_os("NOTIFY_SOCKET") else { return };
    let place = place.as_encoded_bytes();
    let send = || -> io::Result<()> {
        let address = match place.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(OsStr::from_bytes(place))?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
        Ok(())
    };
    if let Err(error) = send() {
        tracing::warn!("the service manager cannot be told: {error}");
    }
}

/// Descriptors that were passed to this very process, with their names (empty: none was given).
pub fn passed() -> Vec<(i32, String)> {
    let number = |variable: &str| env::var(variable).ok()?.parse::<u32>().ok();
    // Started again in the background, it has what was passed to its parent.
    let passed_to = number("LISTEN_PID");
    let ours = passed_to.is_some()
        && [Some(std::process::id()), number(crate::storage_daemon::CHILD)].contains(&passed_to);
    let count = number("LISTEN_FDS").filter(|_| ours).unwrap_or(0);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let named = |at: u32| {
        let fd = FIRST_FD.checked_add_unsigned(at)?;
        Some((fd, names.next().unwrap_or_default().to_owned()))
    };
    (0..count).map_while(named).collect()
}

/// Takes a socket that was passed to the program and listens: by its number, or by its name if it came from systemd.
///
/// Errors, in QEMU's words where it has some: neither, or it is no such socket.
pub fn socket(name: &str) -> Result<Listener, String> {
    let named = passed().into_iter().find(|(_, known)| !name.is_empty() && known == name);
    let number = match (name.parse::<i32>(), named) {
        (Ok(number), _) => number,
        (Err(_), Some((number, _))) => number,
        (Err(_), None) => return Err(format!("Unable to parse FD number {name}")),
    };
    let listener = inherited::take_if(number, Listener::check).and_then(Listener::inherited);
    listener.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("File descriptor '{name}' is not a socket"),
        _ => format!("File descriptor '{name}' is not a socket that listens: {error}"),
    })
}
