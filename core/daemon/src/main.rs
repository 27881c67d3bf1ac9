//! The program `driveline`.

use clap::{CommandFactory, Parser};
use driveline_daemon::{
    cli::{Cli, Command},
    commands,
    commands::ApplyWish,
    logging, storage_daemon,
};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let argv0 = arguments.next().unwrap_or_default();
    if let Some(name) = storage_daemon::is_its_name(argv0.as_ref()) {
        return storage_daemon::run(&name, arguments.collect());
    }
    if arguments.next().is_some_and(|command| command == "storage-daemon") {
        return storage_daemon::run("driveline storage-daemon", arguments.collect());
    }
    // The shell asks what could come next.
    clap_complete::CompleteEnv::with_factory(Cli::command).complete();
    let cli = Cli::parse();
    if let Err(message) = logging::start(cli.log.as_deref()) {
        eprintln!("driveline: {message}");
        return ExitCode::from(2);
    }
    match cli.command {
        Command::Run(file) => commands::run(&file.file),
        Command::Check(file) => commands::check(&file.file),
        Command::Graph { file, format } => commands::graph(&file.file, format),
        Command::Apply { file, dry_run, prune_bitmaps, socket, json } => {
            commands::apply(&file.file, ApplyWish { dry_run, prune_bitmaps }, socket, json)
        }
        Command::StorageDaemon { arguments } => storage_daemon::run("driveline storage-daemon", arguments),
        Command::Ctl(ctl) => commands::ctl(ctl),
        Command::Demo => commands::demo(),
        Command::Bitmap(command) => commands::bitmap(command),
        Command::Map(map) => commands::map(&map),
        Command::CheckImage { repair, json, image } => commands::check_image(&image, repair, json),
        Command::Image(image) => commands::image(image),
        Command::Plugin(plugin) => commands::plugin(plugin),
        Command::Completions { shell } => commands::completions(shell),
    }
}
