//! Jobs of a running daemon: started, shown, steered, waited for.

use super::{
    Failed, Result, Talk, full, given, list, number, print,
    table::{Table, amount},
    text,
};
use crate::cli::ctl::{Copy, Job, Run};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};
use std::{io::IsTerminal, process::ExitCode, time::Duration};

/// How often progress is asked for.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The command that tells what became of jobs that were interrupted.
const INTERRUPTED: &str = "x-driveline-query-interrupted-jobs";

/// What becomes of a job that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtReady {
    /// Its last step is taken.
    Complete,
    /// It is left so.
    Leave,
}

impl Talk {
    pub(super) fn jobs(&mut self) -> Result<ExitCode> {
        let answer = self.client.run("query-jobs", json!({}))?;
        let known = self.client.run(INTERRUPTED, json!({}))?;
        let below = match list(&known).is_empty() {
            true => String::new(),
            false => format!("\n{}", interrupted(&known)),
        };
        self.answer(&answer, |answer| jobs(answer) + &below)
    }

    pub(super) fn interrupted(&mut self) -> Result<ExitCode> {
        let answer = self.client.run(INTERRUPTED, json!({}))?;
        self.answer(&answer, |answer| match list(answer).is_empty() {
            true => "no jobs were interrupted\n".to_owned(),
            false => interrupted(answer),
        })
    }

    /// Goes on with a job that lives; if there is none of that id, with one that was interrupted.
    fn resume(&mut self, id: &str) -> Result<ExitCode> {
        let lives = find(&self.client.run("query-jobs", json!({}))?, id).is_some();
        match !lives && self.waits(id)? {
            true => self.decide("x-driveline-interrupted-job-resume", id),
            false => self.simple("job-resume", json!({ "id": id })),
        }
    }

    /// Was it interrupted, and does it wait for a decision?
    fn waits(&mut self, id: &str) -> Result<bool> {
        let known = self.client.run(INTERRUPTED, json!({}))?;
        Ok(list(&known).iter().any(|job| job["id"] == id && job["outcome"] == "failed"))
    }

    /// Decides about a job that was interrupted, and says what became of it. One that could not be read had the name of its file,
    /// and gets its own back when it goes on; but it stays at its place in the list.
    fn decide(&mut self, command: &str, id: &str) -> Result<ExitCode> {
        let before = self.client.run(INTERRUPTED, json!({}))?;
        let at = list(&before).iter().position(|job| job["id"] == id && job["outcome"] == "failed");
        self.client.run(command, json!({ "id": id }))?;
        let known = self.client.run(INTERRUPTED, json!({}))?;
        let at = at.or_else(|| list(&known).iter().rposition(|job| job["id"] == id));
        let job = at.and_then(|at| list(&known).get(at)).cloned().unwrap_or_default();
        self.answer(&job, |job| format!("{}: {}\n", text(&job["id"]), text(&job["outcome"])))
    }

    pub(super) fn steer(&mut self, verb: Job) -> Result<ExitCode> {
        match verb {
            Job::Pause(job) => self.simple("job-pause", json!({ "id": job.id })),
            Job::Resume(job) => self.resume(&job.id),
            Job::Drop(job) => self.decide("x-driveline-interrupted-job-drop", &job.id),
            Job::Cancel { job, force } => {
                self.simple("block-job-cancel", json!({ "device": job.id, "force": force }))
            }
            Job::Complete(job) => self.simple("job-complete", json!({ "id": job.id })),
            Job::Finalize(job) => self.simple("job-finalize", json!({ "id": job.id })),
            Job::Dismiss(job) => self.simple("job-dismiss", json!({ "id": job.id })),
            Job::SetSpeed { job, speed } => {
                self.simple("block-job-set-speed", json!({ "device": job.id, "speed": speed.0 }))
            }
            Job::Wait(job) => {
                if find(&self.client.run("query-jobs", json!({}))?, &job.id).is_none() {
                    return Err(Failed::Refused(format!("there is no job '{}'", job.id)));
                }
                self.wait(&job.id, AtReady::Leave)
            }
        }
    }

    /// Copies a drive, to a file that the daemon makes or to a node.
    pub(super) fn copy(
        &mut self,
        kind: &str,
        copy: Copy,
        more: Map<String, Value>,
        run: &Run,
        at_ready: AtReady,
    ) -> Result<ExitCode> {
        let to_node = copy.to_node.is_some();
        let target = match (&copy.to_node, &copy.file) {
            (Some(node), _) => node.as_str().into(),
            (None, Some(file)) => full(file),
            (None, None) => Value::Null,
        };
        let mut arguments = given([
            ("target", target),
            ("sync", copy.sync.name().into()),
            ("bitmap", copy.bitmap.into()),
            ("bitmap-mode", copy.bitmap_mode.into()),
        ]);
        if !to_node {
            arguments["format"] = copy.format.into();
            arguments["mode"] = if copy.existing { "existing" } else { "absolute-paths" }.into();
        }
        if let Some(arguments) = arguments.as_object_mut() {
            arguments.extend(more);
        }
        let command = format!("{}-{kind}", if to_node { "blockdev" } else { "drive" });
        self.target = copy.to_node.or_else(|| Some(text(&arguments["target"]).to_owned()));
        self.start(&command, &copy.drive, arguments, run, at_ready)
    }

    /// Starts a job, and stays with it unless told not to.
    pub(super) fn start(
        &mut self,
        command: &str,
        drive: &str,
        mut arguments: Value,
        run: &Run,
        at_ready: AtReady,
    ) -> Result<ExitCode> {
        let id = run.job_id.clone().unwrap_or_else(|| drive.to_owned());
        let common = given([
            ("device", drive.into()),
            ("job-id", id.as_str().into()),
            ("speed", run.speed.map(|bytes| bytes.0).into()),
            // One that is waited for stays until its end has been seen.
            ("auto-dismiss", (!run.detach).then_some(false).into()),
        ]);
        if let (Some(arguments), Some(common)) = (arguments.as_object_mut(), common.as_object()) {
            arguments.extend(common.clone());
        }
        let before = self.shows(drive)?;
        self.client.run(command, arguments).map_err(|failed| match failed {
            Failed::Refused(text) if text.contains("Job ID") && text.contains("in use") => {
                let hint =
                    "`--job-id` gives this one another; `driveline ctl jobs` lists those that are there";
                Failed::Refused(format!("{text}: {hint}"))
            }
            failed => failed,
        })?;
        match run.detach {
            true => self.answer(&json!({ "id": id }), |_| format!("{id}\n")),
            false => match self.wait(&id, at_ready)? {
                ExitCode::SUCCESS => self.say_moved(drive, before),
                failed => Ok(failed),
            },
        }
    }

    /// Shows a job's progress until it is over, or ready and to be left so.
    fn wait(&mut self, id: &str, at_ready: AtReady) -> Result<ExitCode> {
        let bar = bar(id);
        let mut last = json!({ "id": id });
        let mut completing = false;
        let mut end = None;
        loop {
            let job = find(&self.client.run("query-jobs", json!({}))?, id).cloned();
            // The event of its end comes before it is over.
            while let Some(event) = self.client.event_at_hand() {
                end = end.or(ending(&event, id));
            }
            // Gone: another client has dismissed it, or it was to go by itself.
            let Some(job) = job else {
                bar.finish_and_clear();
                return self.gone(id, &last, end);
            };
            bar.set_length(number(&job["total-progress"]));
            bar.set_position(number(&job["current-progress"]));
            bar.set_message(text(&job["status"]).to_owned());
            match text(&job["status"]) {
                "concluded" => {
                    bar.finish_and_clear();
                    return self.concluded(id, &job, end);
                }
                "ready" if at_ready == AtReady::Leave => {
                    bar.finish_and_clear();
                    let hint = format!(
                        "{id} is ready: `driveline ctl job complete {id}` takes its last step, `job cancel {id}` ends it\n"
                    );
                    return self.answer(&job, |_| hint.clone());
                }
                "ready" if !completing => {
                    self.client.run("job-complete", json!({ "id": id }))?;
                    completing = true;
                }
                "pending" if self.waits_for_user(id)? => {
                    bar.finish_and_clear();
                    let hint = format!("{id} waits for `driveline ctl job finalize {id}`\n");
                    return self.answer(&job, |_| hint.clone());
                }
                _ => {}
            }
            last = job;
            // Events only cut the wait short.
            while let Some(event) = self.client.event(Some(LOOK_AGAIN))? {
                end = end.or(ending(&event, id));
                if event["data"]["id"] == id {
                    break;
                }
            }
        }
    }

    /// Every job is pending for a moment; some stay so until their user finalizes them.
    fn waits_for_user(&mut self, id: &str) -> Result<bool> {
        let jobs = self.client.run("query-block-jobs", json!({}))?;
        Ok(list(&jobs).iter().any(|job| job["device"] == id && job["auto-finalize"] == false))
    }

    /// Says how it ended, and lets it be forgotten.
    fn concluded(&mut self, id: &str, job: &Value, end: Option<End>) -> Result<ExitCode> {
        // One that goes by itself may be gone by now.
        let _ = self.client.run("job-dismiss", json!({ "id": id }));
        let end = match (end, job["error"].as_str()) {
            (Some(End::Cancelled), _) | (_, Some("Operation canceled")) => End::Cancelled,
            (_, Some(error)) => End::Failed(error.to_owned()),
            (end, None) => end.unwrap_or(End::Done),
        };
        self.ended(id, job, end)
    }

    /// Nobody can be asked any more: the event of its end says how that was.
    fn gone(&mut self, id: &str, last: &Value, end: Option<End>) -> Result<ExitCode> {
        let unknown = || Failed::Refused(format!("job {id} is gone, and how it ended was not seen"));
        self.ended(id, last, end.ok_or_else(unknown)?)
    }

    fn ended(&mut self, id: &str, job: &Value, end: End) -> Result<ExitCode> {
        if self.json {
            print(&format!("{job:#}\n"));
        }
        match end {
            End::Failed(error) => {
                let target = self.target.as_ref().map(|target| format!(" (it copied to {target})"));
                Err(Failed::Refused(format!("job {id}: {error}{}", target.unwrap_or_default())))
            }
            End::Cancelled => Err(Failed::Refused(format!("job {id} was cancelled"))),
            End::Done => {
                let done = amount(number(&job["current-progress"]));
                Ok(if self.json { ExitCode::SUCCESS } else { print(&format!("{id}: done, {done}\n")) })
            }
        }
    }
}

/// How a job ended.
#[derive(Debug)]
enum End {
    Done,
    Cancelled,
    Failed(String),
}

/// How a job ended, if this is the event of that.
fn ending(event: &Value, id: &str) -> Option<End> {
    let data = &event["data"];
    match text(&event["event"]) {
        _ if data["device"] != id => None,
        "BLOCK_JOB_CANCELLED" => Some(End::Cancelled),
        "BLOCK_JOB_COMPLETED" => Some(match data["error"].as_str() {
            Some(error) => End::Failed(error.to_owned()),
            None => End::Done,
        }),
        _ => None,
    }
}

fn find<'a>(jobs: &'a Value, id: &str) -> Option<&'a Value> {
    list(jobs).iter().find(|job| job["id"] == id)
}

/// A bar on a terminal; nothing where nobody watches.
fn bar(id: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template(
        "{prefix} {bar:30} {percent:>3} %  {bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left  {msg}",
    );
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(id.to_owned());
    bar
}

fn jobs(answer: &Value) -> String {
    let mut table = Table::new(&["job", "type", "status", "done", "of", "error"], &[3, 4]);
    for job in list(answer) {
        table.row([
            text(&job["id"]).to_owned(),
            text(&job["type"]).to_owned(),
            text(&job["status"]).to_owned(),
            amount(number(&job["current-progress"])),
            amount(number(&job["total-progress"])),
            text(&job["error"]).to_owned(),
        ]);
    }
    table.text("no jobs")
}

/// Those that were interrupted when the daemon ended the last time, and what can be done with those that wait.
fn interrupted(answer: &Value) -> String {
    let mut table = Table::new(&["interrupted", "type", "drive", "and then", "left", "why"], &[4]);
    for job in list(answer) {
        table.row([
            text(&job["id"]).escape_debug().to_string(),
            text(&job["type"]).to_owned(),
            text(&job["device"]).to_owned(),
            text(&job["outcome"]).to_owned(),
            job["left"].as_u64().map(amount).unwrap_or_default(),
            text(&job["reason"]).to_owned(),
        ]);
    }
    let mut out = table.text("");
    if let Some(waits) = list(answer).iter().find(|job| job["outcome"] == "failed") {
        let id = text(&waits["id"]);
        out += &format!(
            "\nWhat failed waits: `driveline ctl job resume {id}` tries again, `job drop {id}` gives it up\n"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_one_line() {
        let answer = json!([{ "id": "vda", "type": "stream", "status": "running",
            "current-progress": 524288, "total-progress": 1048576 }]);
        let expected = "\
job  type    status      done     of  error
vda  stream  running  512 KiB  1 MiB
";
        assert_eq!((jobs(&answer).as_str(), jobs(&json!([])).as_str()), (expected, "no jobs\n"));
    }

    #[test]
    fn jobs_that_were_interrupted_are_shown_below() {
        let answer = json!([
            { "id": "m", "type": "mirror", "device": "vda", "outcome": "resumed", "left": 1048576 },
            { "id": "top.qcow2.x", "outcome": "failed", "reason": "it is cut off" },
        ]);
        let expected = "\
interrupted  type    drive  and then   left  why
m            mirror  vda    resumed   1 MiB
top.qcow2.x                 failed           it is cut off

What failed waits: `driveline ctl job resume top.qcow2.x` tries again, `job drop top.qcow2.x` gives it up
";
        assert_eq!(interrupted(&answer), expected);
    }
}
