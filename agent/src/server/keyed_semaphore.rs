//! A semaphore with a limit for each key: one caller cannot use up the permits of others.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard},
};

use crate::linux::sync::lock;

/// Permits, counted by key. Acquiring never waits.
#[derive(Debug)]
pub(super) struct KeyedSemaphore<K> {
    limit: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// A permit. Dropping it returns it.
#[derive(Debug)]
pub(super) struct Permit<K: Eq + Hash> {
    semaphore: Arc<KeyedSemaphore<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> KeyedSemaphore<K> {
    /// At most `limit` permits for each key.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            taken: Mutex::default(),
        }
    }

    /// A permit for `key`; `None` if the key is at its limit.
    pub(super) fn try_acquire(self: &Arc<Self>, key: K) -> Option<Permit<K>> {
        let mut taken = self.lock();
        let n = taken.entry(key.clone()).or_default();
        if *n >= self.limit {
            return None;
        }
        *n += 1;
        Some(Permit {
            semaphore: Arc::clone(self),
            key,
        })
    }
}

impl<K> KeyedSemaphore<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        // A panic cannot leave a change half done.
        lock(&self.taken)
    }
}

impl<K: Eq + Hash> Drop for Permit<K> {
    fn drop(&mut self) {
        let mut taken = self.semaphore.lock();
        if let Some(n) = taken.get_mut(&self.key) {
            *n -= 1;
            if *n == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_limit_and_a_returned_permit_can_be_acquired_again() {
        let semaphore = Arc::new(KeyedSemaphore::new(2));
        let first = semaphore.try_acquire("a").unwrap();
        let _second = semaphore.try_acquire("a").unwrap();
        assert!(semaphore.try_acquire("a").is_none());
        let _other = semaphore.try_acquire("b").unwrap();
        drop(first);
        let _again = semaphore.try_acquire("a").unwrap();
        assert!(semaphore.try_acquire("a").is_none());
    }

    #[test]
    fn a_key_without_permits_takes_no_memory() {
        let semaphore = Arc::new(KeyedSemaphore::new(1));
        for n in 0..100 {
            let permit = semaphore.try_acquire(n);
            assert!(permit.is_some());
        }
        assert!(semaphore.lock().is_empty());
    }
}
