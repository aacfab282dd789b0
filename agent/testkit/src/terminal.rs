//! A pseudo-terminal with a program inside, and what its screen shows.

use std::{
    ffi::OsStr,
    fs::File,
    io::{Read as _, Write as _},
    os::fd::AsFd as _,
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Termios, Winsize, tcgetattr, tcsetwinsize},
};

pub use vt100;

/// How often the reader checks whether the terminal is to be closed.
const CHECK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// A terminal as xterm is, which never answers a query.
pub struct Terminal {
    ours: File,
    theirs: File,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

struct Shared {
    parser: Mutex<vt100::Parser>,
    is_closed: AtomicBool,
}

impl Terminal {
    /// Opens a terminal of this size.
    ///
    /// # Errors
    ///
    /// The system has no pseudo-terminals.
    pub fn open(columns: u16, rows: u16) -> Result<Self> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let name = ptsname(&ours, Vec::new())?;
        let theirs = File::options()
            .read(true)
            .write(true)
            .open(name.to_str()?)?;
        let shared = Arc::new(Shared {
            parser: Mutex::new(vt100::Parser::new(rows, columns, 0)),
            is_closed: AtomicBool::new(false),
        });
        let ours = File::from(ours);
        let (from, to) = (ours.try_clone()?, Arc::clone(&shared));
        let reader = thread::Builder::new()
            .name("terminal".into())
            .spawn(move || read(from, &to))?;
        let terminal = Self {
            ours,
            theirs,
            shared,
            reader: Some(reader),
        };
        terminal.resize(columns, rows)?;
        Ok(terminal)
    }

    /// A command that runs `program` on this terminal, which sends it no signals.
    ///
    /// # Errors
    ///
    /// The process has no free file descriptor.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        // Without a session of its own, the program would have the terminal of this process as its controlling one.
        self.session(&[OsStr::new("--"), program.as_ref()])
    }

    /// The same, with this terminal as the controlling one. The kernel hangs up when the program ends, and what it
    /// wrote last may be lost.
    ///
    /// # Errors
    ///
    /// The process has no free file descriptor.
    pub fn controlled(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        self.session(&[OsStr::new("--ctty"), program.as_ref()])
    }

    fn session(&self, arguments: &[&OsStr]) -> Result<Command> {
        // It replaces itself with the program, so the pid is the program's.
        let mut command = Command::new("setsid");
        command
            .args(arguments)
            .env("TERM", "xterm")
            .env_remove("NO_COLOR")
            .stdin(self.theirs.try_clone()?)
            .stdout(self.theirs.try_clone()?)
            .stderr(self.theirs.try_clone()?);
        Ok(command)
    }

    /// Types these characters.
    ///
    /// # Errors
    ///
    /// The terminal does not take them.
    pub fn send(&self, keys: &str) -> Result<()> {
        (&self.ours)
            .write_all(keys.as_bytes())
            .context("can't type into the terminal")
    }

    /// Changes the size.
    ///
    /// # Errors
    ///
    /// The kernel refuses it.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        self.shared.screen(|s| s.set_size(rows, columns));
        tcsetwinsize(&self.theirs, size).context("can't resize the terminal")
    }

    /// What it shows now.
    pub fn screen(&self) -> vt100::Screen {
        self.shared.screen(|screen| screen.clone())
    }

    /// The lines of the screen as text.
    pub fn text(&self) -> String {
        self.screen().contents()
    }

    /// The modes, such as echo.
    ///
    /// # Errors
    ///
    /// The kernel does not return them.
    pub fn modes(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.theirs)?)
    }
}

impl Drop for Terminal {
    /// Hangs up, as a lost connection does.
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // It ends within `CHECK_EVERY`.
            let _ = reader.join();
        }
    }
}

impl Shared {
    fn screen<T>(&self, f: impl FnOnce(&mut vt100::Screen) -> T) -> T {
        let mut parser = self.parser.lock().unwrap_or_else(PoisonError::into_inner);
        f(parser.screen_mut())
    }
}

/// Gives what the program writes to the parser, until the terminal is closed.
fn read(mut from: File, to: &Shared) {
    let mut bytes = [0; 4096];
    while !to.is_closed.load(Ordering::Relaxed) {
        let mut ready = [PollFd::from_borrowed_fd(from.as_fd(), PollFlags::IN)];
        match poll(&mut ready, Some(&CHECK_EVERY)) {
            // A signal ends poll() even where it restarts other calls, for example at the end of a child.
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return,
        }
        let Ok(n) = from.read(&mut bytes) else {
            return;
        };
        let mut parser = to.parser.lock().unwrap_or_else(PoisonError::into_inner);
        parser.process(&bytes[..n]);
    }
}
