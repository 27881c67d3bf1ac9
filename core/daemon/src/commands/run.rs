//! `driveline run`.

use super::{fail, print, read, say};
use crate::{
    config::Address,
    daemon::{Daemon, StartError},
    notify,
};
use driveline_engine::{net::Listener, signal::Signals};
use futures::future::{Either, select};
use std::{
    path::Path,
    pin::pin,
    process::ExitCode,
    time::{Duration, Instant},
};

/// The same signal once more within this time is the same wish.
const SAME_END: Duration = Duration::from_secs(1);

/// Serves a file until a signal or a monitor ends it.
pub fn run(file: &Path) -> ExitCode {
    let (config, mistakes) = match read(file) {
        Ok(read) => read,
        Err(code) => return code,
    };
    // Caught before anything is open, so that whatever was started is ended in order.
    let mut signals = match Signals::terminate() {
        Ok(signals) => signals,
        Err(error) => return fail(format_args!("cannot catch signals: {error}")),
    };
    let passed = match passed() {
        Ok(passed) => passed,
        Err(error) => return fail(error),
    };
    let first = &mut signals;
    let ended = move || async move { drop(first.next().await) };
    let daemon = match Daemon::start_activated(&config, mistakes, passed, ended) {
        Ok(daemon) => daemon,
        Err(StartError::Config(mistakes)) => {
            mistakes.print();
            return ExitCode::FAILURE;
        }
        Err(error) => return fail(format_args!("{}: {error}", file.display())),
    };
    daemon.to_tell().iter().for_each(say);
    daemon.interrupted().iter().for_each(say);
    let lines: String =
        daemon.exports().iter().map(|export| format!("{}: {}\n", export.id, export.uri)).collect();
    print(&lines);
    if lines.is_empty() {
        say(nothing_served(file, config.monitor.as_ref().map(|monitor| monitor.get_ref())));
    }
    tracing::info!("serving");
    notify::tell("READY=1");
    let code = until_the_end(daemon, &mut signals);
    // One more signal finds the program at its end: what it does by default would kill it, and that is told as a failure.
    std::mem::forget(signals);
    code
}

/// What a program says that serves nothing.
fn nothing_served(file: &Path, monitor: Option<&Address>) -> String {
    let begin = format!("{}: it has no [export.NAME], so nothing is served", file.display());
    match monitor {
        Some(address) => format!("{begin} until somebody says so on the control socket {address}"),
        None => format!("{begin}; it has no [monitor] either, so that stays so until a signal ends this"),
    }
}

/// Serves until a signal or a monitor's quit, and ends everything in order.
pub(crate) fn until_the_end(daemon: Daemon, signals: &mut Signals) -> ExitCode {
    let closed = daemon.engine().block_on_local(|| serve(&daemon, signals));
    let Some(closed) = closed else {
        say("ended at once, by a second signal");
        // Images are left as after a power cut, which they are made for.
        std::process::exit(1);
    };
    let stopped = daemon.stop();
    match closed.and(stopped) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("while closing: {error}")),
    }
}

/// The sockets that systemd passed, with their names.
fn passed() -> Result<Vec<(String, Listener)>, String> {
    let passed = notify::passed().into_iter();
    passed.map(|(number, name)| Ok((name, notify::socket(&number.to_string())?))).collect()
}

/// Waits for the end, and ends everything in order. `None`: there was a signal meanwhile.
async fn serve(daemon: &Daemon, signals: &mut Signals) -> Option<driveline_graph::Result<()>> {
    let mut first = None;
    {
        let (signal, quit) = (pin!(signals.next()), pin!(daemon.quit_asked()));
        match select(signal, quit).await {
            Either::Left((Ok(signal), _)) => {
                first = Some((signal, Instant::now()));
                tracing::info!(signal, "ending");
            }
            Either::Left((Err(error), _)) => tracing::error!("cannot wait for signals: {error}"),
            Either::Right(_) => tracing::info!("ending, as a monitor asked"),
        }
    }
    notify::tell("STOPPING=1");
    let mut close = pin!(daemon.close());
    loop {
        match select(close.as_mut(), pin!(signals.next())).await {
            Either::Left((closed, _)) => return Some(closed),
            // Whoever signals a program and then its group, as timeout does, means one end.
            Either::Right((Ok(again), _))
                if first.is_some_and(|(signal, at)| signal == again && at.elapsed() < SAME_END) => {}
            Either::Right(_) => return None,
        }
    }
}
