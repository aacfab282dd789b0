//! The log, written by a thread of its own.
//!
//! The reader of standard error may stop reading, and a service that waits for it serves no calls. So the log drops
//! lines that it can't write in time, and logs their number. tracing-appender's non-blocking writer drops them without
//! a message, waits for a second at the end of the process, and would add nine packages to the CRI proxy.

mod filter;

use std::{
    env,
    fmt::Display,
    io::{self, IsTerminal as _, Write},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, SystemTime},
};

use tracing_subscriber::{
    Layer as _, Registry, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

/// The environment variable with the log level, such as `debug`, or a list such as `warn,h2=debug`.
const LEVEL: &str = "EBB_LOG";

/// How many lines may wait to be written.
const LINES: usize = 1024;

/// How lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text, with colours if standard error is a terminal and `NO_COLOR` is not set. Not JSON elsewhere: people read
    /// `kubectl logs` and the journal, and expect lines there, as the kubelet and the runtime write them.
    #[default]
    Auto,
    /// Text without colours.
    Text,
    /// One JSON object per line, with `timestamp`, `level`, `message` and the fields of the line.
    Json,
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("not a log format: auto, text or json"),
        }
    }
}

impl LogFormat {
    fn has_colours(self) -> bool {
        let no_colour = env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        self == Self::Auto && !no_colour && io::stderr().is_terminal()
    }

    /// A warning of the log itself, as a line.
    fn warning(self, message: impl Display) -> String {
        let now = humantime::format_rfc3339_micros(SystemTime::now());
        match self {
            Self::Auto | Self::Text => format!("{now}  WARN {message}\n"),
            Self::Json => {
                format!(
                    "{{\"timestamp\":\"{now}\",\"level\":\"WARN\",\"message\":\"{message}\"}}\n"
                )
            }
        }
    }
}

/// Why a process can't log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `EBB_LOG` is not valid.
    #[error(
        "{LEVEL}={value:?}: {why}; write off, error, warn, info, debug or trace, or a list such as warn,h2=debug"
    )]
    Level {
        /// Its value.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// The system has no thread for it.
    #[error("can't start the thread that writes the log")]
    Thread(#[source] io::Error),
}

impl LogError {
    /// The exit status of the process: 2 if `EBB_LOG` is not valid, else 1.
    pub const fn exit_status(&self) -> u8 {
        match self {
            Self::Level { .. } => 2,
            Self::Thread(_) => 1,
        }
    }
}

enum LogItem {
    Line(Vec<u8>),
    /// The sender waits until everything before it is written.
    Flush(SyncSender<()>),
}

/// Logs to standard error, at the level in `EBB_LOG`, or info. The lines of the crates `muted`, whose errors this
/// process handles and logs itself, are left out, unless `EBB_LOG` names the crate or asks for debug.
///
/// # Errors
///
/// `EBB_LOG` is not valid, or no thread can be started.
pub fn start(format: LogFormat, muted: &[&str]) -> Result<Log, LogError> {
    let wanted = env::var_os(LEVEL).unwrap_or_default();
    let wanted = wanted.to_string_lossy();
    let filter = filter::parse(&wanted, muted).map_err(|why| LogError::Level {
        value: wanted.clone().into_owned(),
        why,
    })?;
    let log = Log::to(io::stderr(), format)?;
    let writer = log.clone();
    let lines = fmt::layer()
        .with_writer(move || writer.clone())
        .with_ansi(format.has_colours());
    let lines = match format {
        LogFormat::Auto | LogFormat::Text => lines.with_target(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    Registry::default().with(lines.with_filter(filter)).init();
    Ok(log)
}

/// A log writer. Clones write to the same log.
#[derive(Clone, Debug)]
pub struct Log {
    items: SyncSender<LogItem>,
    lost: Arc<AtomicU64>,
}

impl Log {
    /// Starts a log whose lines go to `out`.
    fn to(out: impl Write + Send + 'static, format: LogFormat) -> Result<Self, LogError> {
        let (items, waiting) = sync_channel(LINES);
        let lost = Arc::<AtomicU64>::default();
        let counted = Arc::clone(&lost);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || write(out, format, &waiting, &counted))
            .map_err(LogError::Thread)?;
        Ok(Self { items, lost })
    }

    /// Waits until all lines so far are written, but no longer than `within`.
    pub fn flush(&self, within: Duration) {
        let (done, written) = sync_channel(1);
        if self.items.try_send(LogItem::Flush(done)).is_ok() {
            // After `within` the caller goes on without the rest.
            let _ = written.recv_timeout(within);
        }
    }
}

impl Write for Log {
    /// Takes one line. Never blocks.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.items.try_send(LogItem::Line(line.to_vec())) {
            Err(TrySendError::Full(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ignores write errors, because only this log could report them.
fn write(mut out: impl Write, format: LogFormat, items: &Receiver<LogItem>, lost: &AtomicU64) {
    for item in items {
        match item {
            LogItem::Line(line) => {
                let _ = out.write_all(&line);
            }
            LogItem::Flush(done) => {
                let _ = out.flush();
                let _ = done.try_send(());
            }
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let lost = format!("{lost} lines of this log were not read in time and are lost");
            let _ = out.write_all(format.warning(lost).as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Condvar, Mutex},
        time::Instant,
    };

    use super::*;

    /// A writer that blocks until it is opened.
    #[derive(Clone, Default)]
    struct Slow(Arc<SlowReader>);

    #[derive(Default)]
    struct SlowReader {
        state: Mutex<ReaderState>,
        opened: Condvar,
    }

    #[derive(Default)]
    struct ReaderState {
        open: bool,
        read: Vec<u8>,
    }

    impl Slow {
        fn open(&self) {
            self.0.state.lock().unwrap().open = true;
            self.0.opened.notify_all();
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.state.lock().unwrap().read.clone()).unwrap()
        }
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let state = self.0.state.lock().unwrap();
            let mut state = self.0.opened.wait_while(state, |s| !s.open).unwrap();
            state.read.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_their_order_before_a_flush_returns() {
        let out = Slow::default();
        out.open();
        let mut log = Log::to(out.clone(), LogFormat::Text).unwrap();
        for n in 0..100 {
            writeln!(log, "{n}").unwrap();
        }
        Log::flush(&log, Duration::from_secs(5));
        let expected: String = (0..100).map(|n| format!("{n}\n")).collect();
        assert_eq!(out.text(), expected);
    }

    #[test]
    fn a_blocked_writer_loses_lines_and_blocks_no_caller() {
        let out = Slow::default();
        let mut log = Log::to(out.clone(), LogFormat::Text).unwrap();
        let started = Instant::now();
        for n in 0..3 * LINES {
            log.write_all(format!("{n}\n").as_bytes()).unwrap();
        }
        Log::flush(&log, Duration::from_millis(50));
        assert!(started.elapsed() < Duration::from_secs(2));
        out.open();
        Log::flush(&log, Duration::from_secs(5));
        while !out.text().contains("are lost") {
            thread::sleep(Duration::from_millis(5));
        }
        let text = out.text();
        let lost = text.lines().find(|l| l.contains("are lost")).unwrap();
        let (_, lost) = lost.split_once(" WARN ").unwrap();
        let lost: usize = lost.split(' ').next().unwrap().parse().unwrap();
        assert!((LINES..=2 * LINES).contains(&lost), "{lost}");
        assert!(text.starts_with("0\n"), "{text}");
    }

    #[test]
    fn a_warning_of_the_log_itself_is_json_if_the_lines_are() {
        let line = LogFormat::Json.warning("7 lines are lost");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&line["level"], &line["message"]),
            (&"WARN".into(), &"7 lines are lost".into())
        );
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'), "{line}");
        assert!(LogFormat::Text.warning("x").ends_with("Z  WARN x\n"));
    }
}
