//! A running graph becomes what a file says: compared (`state.rs`), planned (`plan.rs`), and changed as one (`make.rs`), or taken
//! back (`back.rs`).
//!
//! What is equal is left alone: its files stay open and its requests go on. Bitmaps that the file does not name are kept.

mod back;
mod make;
mod plan;
mod rehearsal;
mod stage;
mod state;

use self::{
    plan::{Plan, Step, plan},
    state::{ExportShape, State},
};
use crate::{
    config::{Config, Mistakes, TlsSection},
    daemon::Inner,
};
use driveline_jobs::JobStatus;
use driveline_qmp::{Applied, ApplyWish, Error, Result};
use std::{path::Path, sync::Arc};

impl Inner {
    /// Changes what runs to what a file says, or tells what would be done. An error changes nothing.
    pub(crate) async fn apply(self: &Arc<Self>, file: &Path, wish: ApplyWish) -> Result<Applied> {
        let _turn = self.applying.lock().await;
        let read = Config::read(file);
        let (config, mut mistakes) =
            read.map_err(|error| Error::generic(format_args!("{}: {error}", file.display())))?;
        config.check(&self.graph, &mut mistakes);
        refuse(&mistakes)?;
        let before = self.running();
        let wanted = State::wanted(&config, &self.graph)?;
        let plan = plan(&before, &wanted, wish.prune_bitmaps);
        if let Some(refused) = plan.refused.first() {
            let text = format_args!("{} '{}': {}", refused.table, refused.name, refused.why);
            return Err(Error::generic(text));
        }
        self.refuse_at_work(&plan)?;
        let steps = plan.steps.iter().map(ToString::to_string).collect();
        let restart = self.takes_restart(&config);
        let done = match wish.dry_run {
            true => self.rehearse(&plan, &config, &before).await.map(drop),
            false => self.make(&plan, &config, &before).await,
        };
        done.map_err(|error| match config.locate(&self.of_the_file(&error)) {
            Some(mistake) => {
                mistakes.add(mistake);
                Error::generic(&mistakes)
            }
            None => error.into(),
        })?;
        if !wish.dry_run {
            self.journals.configure(&config);
        }
        Ok(Applied { steps, kept: plan.kept, restart })
    }

    /// What runs, as far as a file could say it.
    fn running(&self) -> State {
        let exports = self.exports.all_configured();
        let exports = exports.into_iter().map(|(at, export)| (export.id.clone(), ExportShape { at, export }));
        let place = |drive: driveline_graph::DriveView| {
            Some((drive.name.to_string(), self.stores.configured_place(&drive.name)?))
        };
        let stores = self.graph.drives().into_iter().filter_map(place).collect();
        State::running(&self.graph, exports.collect(), &stores)
    }

    /// An error about a node that is defined in place, whose name was made up, is one about the node of the file around it.
    fn of_the_file(&self, error: &driveline_graph::Error) -> driveline_graph::Error {
        let views = self.graph.nodes();
        let (mut node, mut key) = (error.node().unwrap_or_default(), error.option().unwrap_or_default());
        while node.starts_with('#') {
            let around = views.iter().find_map(|view| {
                let child = view.children.iter().find(|child| *child.node == *node)?;
                Some((view.node.name(), child.name.as_str()))
            });
            let Some(around) = around else { break };
            (node, key) = around;
        }
        driveline_graph::Error::io_text(error.errno_code(), error.message()).at(node).key(key)
    }

    /// A job counts on the nodes of its drive.
    fn refuse_at_work(&self, plan: &Plan) -> Result<()> {
        for job in self.jobs.list() {
            if matches!(job.status, JobStatus::Concluded | JobStatus::Null) {
                continue;
            }
            let drive_of = |name: &str| match self.graph.is_drive(name) {
                true => Some(name.into()),
                false => self.graph.drive_of(name),
            };
            let Some(at_work) = drive_of(&job.device) else { continue };
            let touches =
                |step: &&Step| step.changes().is_some_and(|name| drive_of(name).as_ref() == Some(&at_work));
            if let Some(step) = plan.steps.iter().find(touches) {
                let text = format_args!(
                    "job '{}' is at work on drive '{at_work}', which this would change: {step}",
                    job.id
                );
                return Err(Error::generic(text));
            }
        }
        Ok(())
    }

    /// What the file says of the program itself.
    fn takes_restart(&self, config: &Config) -> Vec<String> {
        let started = self.started.lock();
        let mut restart = Vec::new();
        let mut note = |table: &str, differs: bool| {
            restart.extend(differs.then(|| format!("[{table}] takes effect at the next start")));
        };
        note("engine", started.engine != config.engine);
        let monitor = |config: &Config| config.monitor.as_ref().map(|monitor| monitor.get_ref().clone());
        note("monitor", monitor(&started) != monitor(config));
        let tls = |config: &Config| {
            let pair = |section: &TlsSection| (section.name.get_ref().clone(), section.creds.clone());
            config.tls.iter().map(pair).collect::<Vec<_>>()
        };
        note("tls", tls(&started) != tls(config));
        let plugins =
            |config: &Config| config.plugins.iter().map(|path| path.get_ref().clone()).collect::<Vec<_>>();
        note("plugins", plugins(&started) != plugins(config));
        restart
    }
}

/// All mistakes of a file, as far as they can be told without its text.
fn refuse(mistakes: &Mistakes) -> Result<()> {
    if mistakes.is_empty() { Ok(()) } else { Err(Error::generic(mistakes)) }
}
