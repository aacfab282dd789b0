//! The processes of the node, from its `/proc`.

use std::{fs, io, path::Path};

/// The processes whose parent is `pid`. Reads all of `/proc`, because not every kernel has `/proc/PID/task/TID/children`
/// (CONFIG_PROC_CHILDREN).
pub(crate) fn children(proc: &Path, pid: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(proc)? {
        let name = entry?.file_name();
        let Some(child) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may exit while this reads.
        let stat = fs::read_to_string(proc.join(&name).join("stat")).unwrap_or_default();
        if live_parent(&stat) == Some(pid) {
            found.push(child);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The parent of a process that has not exited, from its `/proc/PID/stat` (proc_pid_stat(5)). The second field, the
/// program's name in parentheses, may contain spaces and parentheses.
pub(crate) fn live_parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_read_behind_any_program_name() {
        assert_eq!(live_parent("7 (a) b (c) S 41 7 7 0"), Some(41));
        assert_eq!(live_parent("7 (sh) Z 41 7 7 0"), None);
        assert_eq!(live_parent(""), None);
    }
}
