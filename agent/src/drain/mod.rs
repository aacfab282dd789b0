//! Deciding when a terminating pod may be stopped.

pub mod journal;
pub mod machine;
pub mod policy;
pub mod report;
