//! What a trial is at, so that one which hangs fails and says where.

use std::{
    collections::HashMap,
    fmt::Display,
    sync::{LazyLock, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use libtest_mimic::{Failed, Trial};

/// No trial takes longer, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// The last step of each trial, by the name of its threads.
static STEPS: LazyLock<Mutex<HashMap<String, String>>> = LazyLock::new(Mutex::default);

/// Says what the calling thread's trial is about to do. Nothing where no trial is.
pub(crate) fn step(what: impl Display) {
    if let Some(trial) = thread::current().name() {
        let mut steps = STEPS.lock().unwrap_or_else(PoisonError::into_inner);
        steps.insert(trial.to_owned(), what.to_string());
    }
}

/// A trial with a limit. Its thread bears its name, and so do the threads that [`builder`] makes for it.
pub(crate) fn trial(name: &'static str, run: fn() -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || within(LIMIT, name, run))
}

/// For a thread that does a part of the calling thread's trial.
pub(crate) fn builder() -> thread::Builder {
    let name = thread::current().name().unwrap_or("a trial").to_owned();
    thread::Builder::new().name(name)
}

fn within(limit: Duration, name: &str, run: fn() -> anyhow::Result<()>) -> Result<(), Failed> {
    let (done, outcome) = mpsc::channel();
    let trial = thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let result = run().map_err(|error| format!("{error:#}"));
            let _ = done.send(result);
        })?;
    match outcome.recv_timeout(limit) {
        Ok(result) => Ok(result?),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            let panic = trial.join().err();
            let text = panic.and_then(|panic| panic.downcast::<String>().ok());
            Err(text.map_or_else(|| "panicked".to_owned(), |t| *t).into())
        }
        // Its thread ends with the process.
        Err(mpsc::RecvTimeoutError::Timeout) => {
            let steps = STEPS.lock().unwrap_or_else(PoisonError::into_inner);
            let at = steps.get(name).map_or("its beginning", |step| step);
            let text = format!("not over after {limit:?}; it is still at: {at}");
            // At once, too: other trials may wait for what this one holds.
            eprintln!("{name}: {text}");
            Err(text.into())
        }
    }
}
