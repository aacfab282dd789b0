//! sock_diag sockets of one network namespace, kept for the next question.
//!
//! Opening one means entering the namespace, on a thread made for it; asking by one that is open is a send
//! and a receive on whatever thread.

use std::{io, sync::Mutex};

use super::{Netns, sock_diag::SockDiag};
use crate::lock::lock;

/// A namespace to ask, and the sockets by which it has been asked.
pub(super) struct DiagPool {
    netns: Netns,
    idle: Mutex<Vec<SockDiag>>,
}

impl DiagPool {
    /// Opens nothing yet.
    pub(super) const fn new(netns: Netns) -> Self {
        Self {
            netns,
            idle: Mutex::new(Vec::new()),
        }
    }

    /// The namespace.
    pub(super) const fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Asks by a socket that nobody else uses. One by which asking failed is not used again: parts of the
    /// answer may still be waiting in it.
    pub(super) fn ask<T>(&self, f: impl FnOnce(&mut SockDiag) -> io::Result<T>) -> io::Result<T> {
        let kept = self.idle().pop();
        let mut diag = match kept {
            Some(diag) => diag,
            None => self.netns.run(SockDiag::open)?,
        };
        let answer = f(&mut diag)?;
        self.idle().push(diag);
        Ok(answer)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<SockDiag>> {
        lock(&self.idle)
    }
}
