//! The terminal of `ebb top`: raw mode, the alternate screen, keys. Asks the terminal nothing, because the answer would
//! come between the keys, or never.

use std::{io, mem::ManuallyDrop, thread};

use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event},
    layout::Size,
};
use rustix::io::Errno;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::draw::Picture;

/// The terminal while `ebb top` has it. Dropping this, or a panic, restores its modes and what it showed before.
pub(super) struct Screen {
    /// Never dropped, because its drop panics if the terminal is gone.
    terminal: ManuallyDrop<DefaultTerminal>,
    events: UnboundedReceiver<io::Result<Event>>,
}

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        let terminal = ratatui::try_init().inspect_err(|_| ratatui::restore())?;
        let (sender, events) = unbounded_channel();
        // It ends with the process, or with an error of the terminal.
        thread::Builder::new()
            .name("keys".into())
            .spawn(move || {
                loop {
                    let event = event::read();
                    let is_last = event.is_err();
                    if sender.send(event).is_err() || is_last {
                        return;
                    }
                }
            })
            .inspect_err(|_| ratatui::restore())?;
        let terminal = ManuallyDrop::new(terminal);
        Ok(Self { terminal, events })
    }

    pub(super) fn size(&self) -> io::Result<Size> {
        self.terminal.size()
    }

    /// The next key or change of the size.
    pub(super) async fn next_event(&mut self) -> io::Result<Event> {
        let event = self.events.recv().await;
        event.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))
    }

    pub(super) fn draw(&mut self, picture: &Picture<'_>) -> io::Result<()> {
        self.terminal.draw(|frame| picture.draw(frame)).map(drop)
    }

    /// Makes the next drawing write every character, in case another program has written to the terminal.
    pub(super) fn forget(&mut self) -> io::Result<()> {
        let size = self.terminal.size()?;
        self.terminal.resize(size.into())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs no repair.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// Whether an error says that the terminal is gone, as after the loss of a connection.
pub(super) fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::BrokenPipe || e.raw_os_error() == Some(Errno::IO.raw_os_error())
}
