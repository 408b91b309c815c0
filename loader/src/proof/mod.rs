//! Proof: shows after a run that it was trained on the rows that its settings promise.
//!
//! [`checksum`] adds the hashes of delivered rows to one sum per batch. [`delivery_log`] writes one
//! line with that sum per batch, and joins the lines of all ranks to a chain. `forebay verify`
//! recomputes the sums from the files by code of its own.

pub mod checksum;
pub mod delivery_log;
