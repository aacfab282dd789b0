//! Writing the log on a thread of its own: whoever reads a service's standard error may stop reading, and a service
//! that waits for that would answer nobody. What can't be written in time is left out and counted.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

/// How many lines may wait.
const LINES: usize = 1024;

enum Item {
    Line(Vec<u8>),
    /// Whoever sent it waits until everything before it is written.
    Flush(SyncSender<()>),
}

/// A log. Clones write to the same one.
#[derive(Clone, Debug)]
pub struct Log {
    items: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

impl Log {
    /// Starts a log whose lines go to `out`.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn to(out: impl Write + Send + 'static) -> io::Result<Self> {
        let (items, waiting) = sync_channel(LINES);
        let lost = Arc::<AtomicU64>::default();
        let counted = Arc::clone(&lost);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || write(out, &waiting, &counted))?;
        Ok(Self { items, lost })
    }

    /// Waits until all lines so far are written, but no longer than `within`.
    pub fn flush(&self, within: Duration) {
        let (done, written) = sync_channel(1);
        if self.items.try_send(Item::Flush(done)).is_ok() {
            // Late is as good as never.
            let _ = written.recv_timeout(within);
        }
    }
}

impl Write for Log {
    /// Takes one line, and never waits.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.items.try_send(Item::Line(line.to_vec())) {
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

/// Nobody can be told of a failure: this is where it would be told.
fn write(mut out: impl Write, items: &Receiver<Item>, lost: &AtomicU64) {
    for item in items {
        match item {
            Item::Line(line) => {
                let _ = out.write_all(&line);
            }
            Item::Flush(done) => {
                let _ = out.flush();
                let _ = done.try_send(());
            }
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(
                out,
                "{lost} lines of this log were not read in time and are lost"
            );
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

    /// A reader that reads nothing until it is let.
    #[derive(Clone, Default)]
    struct Slow(Arc<Shared>);

    #[derive(Default)]
    struct Shared {
        state: Mutex<State>,
        opened: Condvar,
    }

    #[derive(Default)]
    struct State {
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
        let mut log = Log::to(out.clone()).unwrap();
        for n in 0..100 {
            writeln!(log, "{n}").unwrap();
        }
        Log::flush(&log, Duration::from_secs(5));
        let expected: String = (0..100).map(|n| format!("{n}\n")).collect();
        assert_eq!(out.text(), expected);
    }

    #[test]
    fn a_reader_that_has_stopped_costs_lines_and_no_time() {
        let out = Slow::default();
        let mut log = Log::to(out.clone()).unwrap();
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
        let lost: usize = lost.split(' ').next().unwrap().parse().unwrap();
        assert!((LINES..=2 * LINES).contains(&lost), "{lost}");
        assert!(text.starts_with("0\n"), "{text}");
    }
}
