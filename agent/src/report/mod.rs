//! Telling people and programs: JSON shapes, tables, metrics, Events.

pub mod events;
pub mod explain;
pub mod metrics;
pub mod news;
pub mod policies;
pub mod table;
pub mod tell;
pub mod text;
pub mod top;
pub mod view;
