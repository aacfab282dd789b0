//! Telling people and programs: JSON shapes, tables, metrics.

pub mod metrics;
pub mod table;
pub mod tell;
pub mod text;
pub mod view;
