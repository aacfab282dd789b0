//! Removes what a killed agent has left in its run directory (`ebb agent --cleanup`): socket, lock, journal, history and
//! the note of a stop.
//!
//! BPF programs and maps are not pinned, so the kernel frees them with the agent's descriptors.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use crate::{
    app::run_dir::{RunDir, RunDirError, lock_in},
    kernel,
};

/// How often to check, 50 ms apart, whether the kernel has freed the programs of a process that has just ended.
const CHECKS: u32 = 20;

/// Cleans up, and returns a line for each file that was removed, and one if programs are still loaded.
///
/// # Errors
///
/// An agent runs ([`RunDirError::Taken`]), or a file can't be removed.
pub(crate) fn cleanup(run_dir: &Path) -> Result<Vec<String>, RunDirError> {
    let mut lines = Vec::new();
    if run_dir
        .try_exists()
        .map_err(|e| RunDirError::unusable(run_dir, e))?
    {
        let was_locked = lock_in(run_dir).exists();
        // Locked until the end of this block, so that no agent can start meanwhile.
        let locked = RunDir::take(run_dir)?;
        for path in locked.files() {
            lines.extend(remove(&path)?);
        }
        let lock = remove(&lock_in(run_dir))?;
        lines.extend(lock.filter(|_| was_locked));
    }
    let loaded = loaded();
    if loaded > 0 {
        lines.push(format!(
            "{loaded} BPF programs of ebb are loaded: they belong to an agent with another run directory, and end with it"
        ));
    }
    Ok(lines)
}

/// How many programs of ebb are loaded. Gives the kernel a second to free those of an agent that has just ended.
fn loaded() -> usize {
    for _ in 0..CHECKS {
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
