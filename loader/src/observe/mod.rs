//! Observation: counts what happened, and records when each thread did what.
//!
//! [`stats`] holds the counters behind `stats()`. `trace` writes the spans of each thread to the
//! file that `FOREBAY_TRACE` names. `slow_reads` notices reads that take long. None of them
//! influences what the loader delivers, and none knows what a batch contains.

pub(crate) mod slow_reads;
pub mod stats;
pub(crate) mod trace;
