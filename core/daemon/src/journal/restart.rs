//! What becomes of jobs that were interrupted: they go on, are given up, or wait for their user's decision.

use super::{
    Interrupted, Journals, Outcome,
    find::{Candidate, id_of, is_blank, read},
    page,
};
use driveline_graph::{Error, Kind, Result};
use driveline_jobs::{
    Completion, FoundJob, JobArgs, JobRecord, Jobs, Journal, OnRestart, Page, Restarted, undo_half_end,
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

/// What is to become of a job, and what was found of it until then.
struct Case {
    report: Interrupted,
    written: Option<(JobRecord, Arc<dyn Page>)>,
}

impl Journals {
    /// Decides about all jobs that were interrupted and not decided about yet. Nobody may be served before this is done: a backup's
    /// filter has to be in place. Returns what became of them; it is listed, too.
    pub(crate) async fn restart_all(&self, jobs: &Jobs) -> Vec<Interrupted> {
        let _turn = self.turn.lock().await;
        self.looks.store(true, SeqCst);
        let mut groups: Vec<(Option<String>, bool, Vec<PathBuf>)> = Vec::new();
        let mut reports = Vec::new();
        for Candidate { path, record } in self.candidates() {
            if self.knows(&path) {
                continue;
            }
            match record {
                // The program ended while it made the file: nobody was told that there is a job.
                Err(_) if is_blank(&path) => self.forget(&path),
                Err(error) => reports.push(unreadable(&path, &error)),
                Ok(record) if self.wants_drop(&record) => reports.push(self.give_up(&path, &record)),
                Ok(record) => {
                    let together = record.group.is_some();
                    let is_backup = matches!(record.args, JobArgs::Backup(_));
                    let group = groups.iter_mut().find(|(group, ..)| together && *group == record.group);
                    match group {
                        Some((_, backups, paths)) => {
                            *backups |= is_backup;
                            paths.push(path);
                        }
                        None => groups.push((record.group, is_backup, vec![path])),
                    }
                }
            }
        }
        // A backup's filter goes on top of a drive, where those of other jobs cannot be put any more.
        groups.sort_by_key(|(_, has_backup, _)| *has_backup);
        for (.., paths) in groups {
            reports.extend(self.restart(jobs, &paths, false).await);
        }
        // Whoever starts the program tells of them.
        reports.iter().for_each(|report| tracing::info!("{report}"));
        self.interrupted.lock().extend(reports.iter().cloned());
        reports
    }

    /// Nobody but the log tells of what is found later.
    fn list(&self, reports: &[Interrupted]) {
        for report in reports {
            match report.outcome {
                Outcome::Resumed | Outcome::Finished => tracing::info!("{report}"),
                Outcome::Dropped | Outcome::Failed => tracing::warn!("{report}"),
            }
        }
        self.interrupted.lock().extend(reports.iter().cloned());
    }

    /// Looks for jobs of images that came after the start. They wait for a decision: their other images may come yet. Nobody may
    /// write to those images before this is done, since nobody marks for the jobs what is written. Returns what was found; it is
    /// listed, too.
    pub(crate) async fn find_added(&self) -> Vec<Interrupted> {
        let _turn = self.turn.lock().await;
        self.look()
    }

    /// The same for whoever has the turn.
    fn look(&self) -> Vec<Interrupted> {
        if !self.looks.load(SeqCst) {
            return Vec::new();
        }
        let mut reports = Vec::new();
        for Candidate { path, record } in self.candidates() {
            // One that is over is gone by the time that nobody knows it any more.
            if self.knows(&path) || !path.exists() {
                continue;
            }
            let found = match self.open(&path).inspect_err(|_| self.miss(&path)) {
                // It lives, in another program; or it was over in this one just now.
                Err(error) if error.kind() == Kind::Busy || !path.exists() => continue,
                found => found,
            };
            let (record, page) = match (record, found) {
                (Err(_), _) if is_blank(&path) => {
                    self.forget(&path);
                    continue;
                }
                (Ok(record), Ok(found)) => (record, found.page),
                (Err(error), _) | (_, Err(error)) => {
                    reports.push(unreadable(&path, &error));
                    continue;
                }
            };
            if self.wants_drop(&record) {
                drop(page);
                reports.push(self.give_up(&path, &record));
                continue;
            }
            let late = "its images came after the start".to_owned();
            let report = report(&path, &record, Outcome::Failed, Some(late));
            reports.push(self.conclude(Case { report, written: Some((record, page)) }, &Ok(Vec::new())));
        }
        self.list(&reports);
        reports
    }

    /// Tries once more with a job that could not go on, and with those that end together with it.
    ///
    /// Errors: there is none of that id, or they still cannot.
    pub(crate) async fn resume(&self, jobs: &Jobs, id: &str) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.look();
        let failed = self.failed(id)?;
        let reports = self.restart(jobs, &self.together(&failed.file), true).await;
        reports.iter().for_each(|report| self.replace(report.clone()));
        // What is wrong with itself says more than what is wrong with another one.
        let failed = reports.into_iter().filter(|report| report.outcome == Outcome::Failed);
        match failed.min_by_key(|report| report.id != id) {
            Some(report) => Err(Error::new(Kind::Invalid, report)),
            None => Ok(()),
        }
    }

    /// The files of a job that waits for a decision, and of those that end together with it.
    fn together(&self, file: &Path) -> Vec<PathBuf> {
        let candidates = self.candidates();
        let group = |candidate: &Candidate| candidate.record.as_ref().ok()?.group.clone();
        let own = candidates.iter().find(|candidate| candidate.path == file).and_then(group);
        let interrupted = self.interrupted.lock();
        let waits =
            |path: &Path| interrupted.iter().any(|job| job.file == path && job.outcome == Outcome::Failed);
        let is_one =
            |one: &Candidate| one.path == file || own.is_some() && group(one) == own && waits(&one.path);
        let mut files: Vec<_> = candidates.into_iter().filter(is_one).map(|one| one.path).collect();
        if files.is_empty() {
            files.push(file.to_owned());
        }
        files
    }

    /// Gives up a job that could not go on.
    ///
    /// Errors: there is none of that id, another program has it, or its file cannot be removed.
    pub(crate) async fn give_up_failed(&self, id: &str) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.look();
        let failed = self.failed(id)?;
        // What cannot be read can go; what another program has cannot.
        match self.open(&failed.file) {
            Ok(found) => found.page.remove()?,
            Err(error) if error.kind() == Kind::Busy => return Err(error),
            Err(_) => page::remove(&failed.file)?,
        }
        self.replace(Interrupted { outcome: Outcome::Dropped, reason: None, ..failed });
        Ok(())
    }

    fn failed(&self, id: &str) -> Result<Interrupted> {
        let interrupted = self.interrupted.lock();
        let failed = interrupted.iter().find(|job| job.id == id && job.outcome == Outcome::Failed);
        let none = || {
            Error::new(Kind::NotFound, format_args!("no job '{id}' was interrupted and waits for a decision"))
        };
        failed.cloned().ok_or_else(none)
    }

    fn replace(&self, report: Interrupted) {
        let mut interrupted = self.interrupted.lock();
        let waits = |job: &&mut Interrupted| job.file == report.file && job.outcome == Outcome::Failed;
        if let Some(known) = interrupted.iter_mut().find(waits) {
            *known = report;
        }
    }

    /// Is it of a job that lives, or that waits for a decision? What was decided is gone: a file in its place is of another job.
    fn knows(&self, path: &Path) -> bool {
        let lives = |book: &std::sync::Weak<page::Book>| book.upgrade().is_some_and(|book| book.is(path));
        let waits = |job: &Interrupted| job.file == path && job.outcome == Outcome::Failed;
        self.interrupted.lock().iter().any(waits) || self.books.lock().iter().any(lives)
    }

    /// Without its own word a job goes by what its drive says, when it began or now.
    fn wants_drop(&self, record: &JobRecord) -> bool {
        let own = match &record.args {
            JobArgs::Stream(args) => args.on_restart,
            JobArgs::Commit(args) => args.on_restart,
            JobArgs::Mirror(args) => args.on_restart,
            JobArgs::Backup(args) => args.on_restart,
        };
        let device = record.args.device();
        let drive = self.graph.drive_of(device);
        let now = || self.on_restart(drive.as_deref().unwrap_or(device));
        record.on_restart == OnRestart::Drop || own.is_none() && now() == OnRestart::Drop
    }

    fn forget(&self, path: &Path) {
        match page::remove(path) {
            Ok(()) => tracing::info!("{}: a job that had not begun when the program ended", path.display()),
            Err(error) => tracing::error!("{error}"),
        }
    }

    fn give_up(&self, path: &Path, record: &JobRecord) -> Interrupted {
        match self.open(path).and_then(|found| found.page.remove()) {
            Ok(()) => report(path, record, Outcome::Dropped, Some("on-restart is \"drop\"".into())),
            Err(error) => report(path, record, Outcome::Failed, Some(error.to_string())),
        }
    }

    /// Opens the file of a job. One that is locked is tried for a second: the kernel may give up the locks of a program that was killed
    /// only some time after it.
    async fn open_patiently(&self, path: &Path) -> Result<FoundJob> {
        const PATIENCE: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.open(path) {
                Err(error) if error.kind() == Kind::Busy && Instant::now() < deadline => {
                    driveline_engine::sleep(PATIENCE / 50).await;
                }
                found => return found.inspect_err(|_| self.miss(path)),
            }
        }
    }

    /// Lets jobs go on that end together, all of them or none. `insists`: their user has asked for it.
    async fn restart(&self, jobs: &Jobs, paths: &[PathBuf], insists: bool) -> Vec<Interrupted> {
        // What an attempt before this one has let go is gone by then, and with it the locks.
        let mut start = jobs.begin().await;
        let mut found = Vec::new();
        for path in paths {
            found.push(self.open_patiently(path).await);
        }
        if let Some(id) =
            paths.iter().zip(&found).find_map(|(path, found)| is_busy(found).then(|| id_of_record(path)))
            && paths.len() > 1
        {
            start.give_up().await;
            return self.leave(paths, found, &id);
        }
        let mut opened: Vec<FoundJob> = Vec::new();
        let mut refused: Vec<Option<Error>> = Vec::new();
        for found in found {
            match found {
                Ok(found) => {
                    opened.push(found);
                    refused.push(None);
                }
                Err(error) => refused.push(Some(error)),
            }
        }
        undo_half_end(&mut opened);
        let mut opened = opened.into_iter();
        let mut cases: Vec<Case> = Vec::new();
        for (path, refused) in paths.iter().zip(refused) {
            let found = match refused.map_or_else(|| Ok(opened.next().expect("it was opened")), Err) {
                Ok(found) => found,
                Err(error) => {
                    let report = match read(path) {
                        Ok(record) => report(path, &record, Outcome::Failed, Some(error.to_string())),
                        Err(_) => unreadable(path, &error),
                    };
                    cases.push(Case { report, written: None });
                    continue;
                }
            };
            let (record, page, left) = (found.record.clone(), found.page.clone(), left(&found));
            let (outcome, reason) = match start.restart(found, insists).await {
                Ok(Restarted::Staged(_)) => (Outcome::Resumed, None),
                Ok(Restarted::Finished(reason)) => (Outcome::Finished, Some(reason)),
                Ok(Restarted::Lost(reason)) => (Outcome::Dropped, Some(reason)),
                Err(error) => (Outcome::Failed, Some(error.to_string())),
            };
            let mut report = report(path, &record, outcome, reason);
            report.left = left.filter(|_| outcome == Outcome::Resumed);
            cases.push(Case { report, written: Some((record, page)) });
        }
        let stays_away = cases.iter().find(|case| case.report.outcome != Outcome::Resumed);
        let alone = stays_away.map(|case| {
            let (id, reason) = (&case.report.id, case.report.reason.as_deref().unwrap_or_default());
            format!("it ends together with job '{id}', which does not go on: {reason}")
        });
        let made = match alone {
            Some(reason) => {
                drop(start);
                Err(reason)
            }
            None => start.make(Completion::Grouped).await.map_err(|error| error.to_string()),
        };
        cases.into_iter().map(|case| self.conclude(case, &made)).collect()
    }

    /// Another program has one of a group: that may end, and then its user decides about all of them. The drives are served without
    /// them from now on, which is written down of those that can be opened.
    fn leave(&self, paths: &[PathBuf], found: Vec<Result<FoundJob>>, busy: &str) -> Vec<Interrupted> {
        let why = format!("it ends together with job '{busy}', which another program has");
        let left = paths.iter().zip(found).map(|(path, found)| match found {
            Ok(FoundJob { mut record, page, .. }) => {
                record.unwatched = true;
                if let Err(error) = page.write(&record) {
                    tracing::error!("{}: {error}", path.display());
                    self.miss(path);
                }
                report(path, &record, Outcome::Failed, Some(why.clone()))
            }
            Err(error) => match read(path) {
                Ok(record) => report(path, &record, Outcome::Failed, Some(error.to_string())),
                Err(_) => unreadable(path, &error),
            },
        });
        left.collect()
    }

    fn conclude(&self, case: Case, made: &std::result::Result<Vec<String>, String>) -> Interrupted {
        let Case { mut report, written } = case;
        if let (Outcome::Resumed, Err(reason)) = (report.outcome, made) {
            (report.outcome, report.reason, report.left) = (Outcome::Failed, Some(reason.clone()), None);
        }
        let Some((record, page)) = written else { return report };
        if report.outcome == Outcome::Failed {
            // The drive is served without it from now on.
            let mut unwatched = record;
            unwatched.unwatched = true;
            let is_backup = matches!(unwatched.args, JobArgs::Backup(_));
            let noted = if is_backup { Ok(()) } else { page.write(&unwatched) };
            if is_backup || noted.is_err() {
                let reason = report.reason.unwrap_or_default();
                let lost = match noted {
                    Ok(()) => "its point in time is lost".to_owned(),
                    Err(error) => format!("that cannot be written down: {error}"),
                };
                (report.outcome, report.reason) = (Outcome::Dropped, Some(format!("{reason}; {lost}")));
            }
        }
        let is_over = matches!(report.outcome, Outcome::Finished | Outcome::Dropped);
        if let Some(Err(error)) = is_over.then(|| page.remove()) {
            tracing::error!("job '{}', which is over: {error}", report.id);
        }
        report
    }
}

/// Has another program the file of a job?
fn is_busy(found: &Result<FoundJob>) -> bool {
    matches!(found, Err(error) if error.kind() == Kind::Busy)
}

/// What a job is called, whoever has its file.
fn id_of_record(path: &Path) -> String {
    read(path).map_or_else(|_| id_of(path), |record| record.id)
}

/// One of which nothing can be told but its file.
fn unreadable(path: &Path, error: &Error) -> Interrupted {
    Interrupted {
        id: id_of(path),
        kind: None,
        device: None,
        outcome: Outcome::Failed,
        reason: Some(error.to_string()),
        left: None,
        file: path.to_owned(),
    }
}

fn report(path: &Path, record: &JobRecord, outcome: Outcome, reason: Option<String>) -> Interrupted {
    let (kind, device) = (Some(record.args.kind().name()), Some(record.args.device().to_owned()));
    Interrupted { id: record.id.clone(), kind, device, outcome, reason, left: None, file: path.to_owned() }
}

/// How much is left to copy, as far as a bitmap says it.
fn left(found: &FoundJob) -> Option<u64> {
    let is_backup = matches!(found.record.args, JobArgs::Backup(_));
    let bits = &found.bitmaps.first()?.bits;
    Some(if is_backup { bits.length() - bits.dirty_bytes() } else { bits.dirty_bytes() })
}
