//! The id of the current boot, which tells records of an earlier boot from those of this one.

use std::{fs, io};

/// The id of the current boot (random(4)). Records of another boot, such as times, do not apply to this one.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}
