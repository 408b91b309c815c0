//! Observation: counts what happened, and records when each thread did what.
//!
//! [`stats`] holds the counters behind `stats()`. `trace` writes the spans of each thread to the
//! file that `FOREBAY_TRACE` names. Neither influences what the loader delivers, and neither knows
//! what a batch contains.

pub mod stats;
pub(crate) mod trace;
