//! So much for each and no more: what one takes is not missing for the others.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard},
};

use crate::lock::lock;

/// What each may have at a time.
#[derive(Debug)]
pub struct Shares<K> {
    most: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// One taken; given back when dropped.
#[derive(Debug)]
pub struct Share<K: Eq + Hash> {
    of: Arc<Shares<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> Shares<K> {
    /// At most `most` for each.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            taken: Mutex::default(),
        }
    }

    /// Takes one more for `key`; `None` if it has as many as it may.
    pub fn take(self: &Arc<Self>, key: K) -> Option<Share<K>> {
        let mut taken = self.lock();
        let n = taken.entry(key.clone()).or_default();
        if *n >= self.most {
            return None;
        }
        *n += 1;
        Some(Share {
            of: Arc::clone(self),
            key,
        })
    }
}

impl<K> Shares<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        // Every change is one step.
        lock(&self.taken)
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut taken = self.of.lock();
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
    fn each_has_its_own_share_and_what_is_given_back_can_be_taken_again() {
        let shares = Arc::new(Shares::new(2));
        let first = shares.take("a").unwrap();
        let _second = shares.take("a").unwrap();
        assert!(shares.take("a").is_none());
        let _other = shares.take("b").unwrap();
        drop(first);
        let _again = shares.take("a").unwrap();
        assert!(shares.take("a").is_none());
    }

    #[test]
    fn nothing_is_remembered_of_who_has_nothing() {
        let shares = Arc::new(Shares::new(1));
        for n in 0..100 {
            let share = shares.take(n);
            assert!(share.is_some());
        }
        assert!(shares.lock().is_empty());
    }
}
