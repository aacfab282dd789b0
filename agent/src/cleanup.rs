//! Removing what an agent that was killed leaves (`ebb agent --cleanup`).
//!
//! That is little: nothing is pinned, so the kernel frees programs and maps with the agent's descriptors. Its
//! socket, lock and journal stay in the run directory, and one that was stopped leaves a list of its flows. Another
//! agent would take them over.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use crate::{
    kernel,
    run_dir::{RunDir, RunDirError, lock_in},
};

/// How long the kernel may take to free the programs of a process that has just ended.
const FREED_WITHIN: u32 = 20;

/// Cleans up, and returns what is worth saying, line by line; nothing if there was nothing to do.
///
/// # Errors
///
/// An agent runs ([`RunDirError::Taken`]), or something can't be removed.
pub fn cleanup(run_dir: &Path) -> Result<Vec<String>, RunDirError> {
    let mut said = Vec::new();
    if run_dir
        .try_exists()
        .map_err(|e| RunDirError::unusable(run_dir, e))?
    {
        let was_locked = lock_in(run_dir).exists();
        // Held to the end: no agent can start meanwhile.
        let taken = RunDir::take(run_dir)?;
        for path in taken.made() {
            said.extend(remove(&path)?);
        }
        let lock = remove(&lock_in(run_dir))?;
        said.extend(lock.filter(|_| was_locked));
    }
    let loaded = loaded();
    if loaded > 0 {
        said.push(format!(
            "{loaded} BPF programs of ebb are loaded: an agent with another run directory has them, and they go with it"
        ));
    }
    Ok(said)
}

/// How many programs of ebb are loaded, once those of an agent that has just ended had time to go.
fn loaded() -> usize {
    for _ in 0..FREED_WITHIN {
        if kernel::loaded_programs() == 0 {
            return 0;
        }
        sleep(Duration::from_millis(50));
    }
    kernel::loaded_programs()
}

fn remove(path: &PathBuf) -> Result<Option<String>, RunDirError> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Ok(()) => Ok(Some(format!("removed {}", path.display()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(RunDirError::unusable(path, e)),
    }
}
