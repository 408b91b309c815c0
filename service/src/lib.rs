//! Serves batches to other processes, and takes them: Arrow Flight over a Unix socket or TCP.
//!
//! [`server`] opens corpora for consumers and streams their batches. [`client`] makes a
//! [`forebay::Loader`] whose rows come from a server. [`protocol`] is what travels between both:
//! the request for a corpus, its description, tickets, record batches and errors.
//!
//! [`metrics`] shows the numbers of a process to other programs and to people.
//!
//! A request names a position, so that a server holds none. Any server that opened the same corpus
//! gives the same batches.

pub mod access;
mod address;
pub mod client;
pub mod metrics;
pub mod protocol;
pub mod server;

pub use client::open;
