//! One way to take a lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also where a thread has panicked with the lock held. For what is whole at every step: nothing that could
/// panic happens in the middle of a change.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
