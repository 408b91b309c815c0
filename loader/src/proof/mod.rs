//! Proof: what was delivered, as a checksum of rows and as a log with one line per batch.

pub mod checksum;
pub mod delivery_log;
