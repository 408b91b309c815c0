//! Observation: what happened so far, as counters, and what each thread did when, as a trace.

pub mod stats;
pub(crate) mod trace;
