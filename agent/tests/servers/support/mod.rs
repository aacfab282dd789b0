//! Pods with real servers, drains of them, and the table in docs/until.md.

pub(crate) mod drains;
pub(crate) mod pod;
pub(crate) mod until_table;
