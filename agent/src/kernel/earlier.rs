//! What one agent tells the next of the flows that are open when it ends: since when, and which are probes. Without
//! it, an upgrade would make all of them as young as the new agent.
//!
//! A file in the run directory: a line that names the boot, then an `ebb_common::RememberedFlow` for each flow. It is
//! read once and removed. Socket cookies are given only once between two boots, so an entry that is out of date is that
//! of a flow which is over, and does no harm.

use std::{fs, io, path::Path};

use ebb_common::{Remembered, RememberedFlow};

use super::bytes::Bytes;
use crate::host::files;

/// As many flows as are remembered at most: 6 MiB in a file, some 25 MiB of the kernel's memory while the next agent
/// starts.
const MOST: usize = 1 << 18;

/// Of each flow its socket's cookie and what is to be known of it.
pub(super) type Earlier = Vec<(u64, Remembered)>;

/// Writes what the program `remember` wrote. Returns of how many flows.
pub(super) fn write(path: &Path, boot_id: &str, flows: &[u8]) -> io::Result<usize> {
    let (all, _) = flows.as_chunks::<{ size_of::<RememberedFlow>() }>();
    let all = all.get(..MOST).unwrap_or(all);
    let text = [boot_id.as_bytes(), b"\n", all.as_flattened()].concat();
    files::write_for_this_boot(path, &text)?;
    Ok(all.len())
}

/// Reads the file and removes it. Nothing where there is none, or where it is of another boot.
pub(super) fn take(path: &Path, boot_id: &str) -> io::Result<Earlier> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e),
    };
    fs::remove_file(path)?;
    let of_this_boot = text.strip_prefix(boot_id.as_bytes());
    let Some(flows) = of_this_boot.and_then(|rest| rest.strip_prefix(b"\n")) else {
        return Ok(vec![]);
    };
    let (all, _) = flows.as_chunks::<{ size_of::<RememberedFlow>() }>();
    Ok(all
        .iter()
        .take(MOST)
        .filter_map(|one| read(Bytes(one)))
        .collect())
}

fn read(mut b: Bytes<'_>) -> Option<(u64, Remembered)> {
    let cookie = b.u64()?;
    let flow = Remembered {
        opened_at: b.u64()?,
        seeded: b.u8()?.min(1),
        probe: b.u8()?.min(1),
        zero: [0; 6],
    };
    Some((cookie, flow))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(cookie: u64, opened_at: u64, seeded: u8, probe: u8) -> Vec<u8> {
        let mut bytes = [cookie.to_ne_bytes(), opened_at.to_ne_bytes()].concat();
        bytes.extend([seeded, probe, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn what_is_written_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows");
        let flows = [flow(7, 70, 0, 1), flow(8, 80, 1, 0)].concat();
        assert_eq!(write(&path, "boot", &flows).unwrap(), 2);
        let taken = take(&path, "boot").unwrap();
        let of =
            |(cookie, flow): &(u64, Remembered)| (*cookie, flow.opened_at, flow.seeded, flow.probe);
        assert_eq!(
            taken.iter().map(of).collect::<Vec<_>>(),
            [(7, 70, 0, 1), (8, 80, 1, 0)]
        );
        assert!(take(&path, "boot").unwrap().is_empty());
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            0,
            "nothing is left"
        );
    }

    #[test]
    fn what_is_of_another_boot_or_broken_off_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows");
        write(&path, "boot", &flow(7, 70, 0, 0)).unwrap();
        assert!(take(&path, "other").unwrap().is_empty());
        for text in [&b""[..], b"bo", b"boot", b"boot\n123"] {
            fs::write(&path, text).unwrap();
            assert_eq!(take(&path, "boot").unwrap().len(), 0, "{text:?}");
        }
        let mut cut = b"boot\n".to_vec();
        cut.extend(flow(7, 70, 0, 0));
        cut.extend(&flow(8, 80, 0, 0)[..20]);
        fs::write(&path, cut).unwrap();
        assert_eq!(take(&path, "boot").unwrap().len(), 1);
    }
}
