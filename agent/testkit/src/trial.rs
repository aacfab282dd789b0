//! Trials with a time limit. A trial that hangs fails, and its message names its last [`step`].

use std::collections::HashMap;
use std::env;
use std::fmt::Display;
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};

/// The limit of each trial, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// `EBB_TEST_SLOW`: how much slower this machine is than those that the limits were chosen for. Not set: 1.
static SLOW: LazyLock<u32> = LazyLock::new(|| match env::var("EBB_TEST_SLOW") {
    Ok(text) => text.parse().expect("EBB_TEST_SLOW is a whole number"),
    Err(_) => 1,
});

/// The last step of each trial, by the name of its threads.
static STEPS: LazyLock<Mutex<HashMap<String, String>>> = LazyLock::new(Mutex::default);

/// Defines a function `trials()` that returns a [`trial`](fn@crate::trial::trial) for each of these functions, under its name.
#[macro_export]
macro_rules! trials {
    ($($function:ident),* $(,)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$($crate::trial::trial(stringify!($function), $function)),*]
        }
    };
}

/// A trial with a limit. Its thread has its name, and so do the threads that [`thread_builder`] makes for it.
pub fn trial(name: &'static str, run: fn() -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || run_within(scaled(LIMIT), name, run))
}

/// Records what the calling thread's trial is about to do. Has no effect outside of a trial.
pub fn step(what: impl Display) {
    if let Some(trial) = thread::current().name() {
        let mut steps = STEPS.lock().unwrap_or_else(PoisonError::into_inner);
        steps.insert(trial.to_owned(), what.to_string());
    }
}

/// For a thread that does a part of the calling thread's trial.
pub fn thread_builder() -> thread::Builder {
    let name = thread::current().name().unwrap_or("a trial").to_owned();
    thread::Builder::new().name(name)
}

/// The time limit on this machine for what takes at most `limit` on a usual one. Not for a time in which something must
/// not happen.
pub fn scaled(limit: Duration) -> Duration {
    limit * *SLOW
}

fn run_within(limit: Duration, name: &str, run: fn() -> anyhow::Result<()>) -> Result<(), Failed> {
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
            let at = steps.get(name).map_or("none", |step| step);
            let text = format!("not over after {limit:?}; its last step: {at}");
            // At once, too: other trials may wait for what this one holds.
            eprintln!("{name}: {text}");
            Err(text.into())
        }
    }
}
