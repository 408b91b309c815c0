//! Token loader for LLM training.
//!
//! Paths become shards, shards an index, the index a layout of sequences, sequences an order, and the order batches:
//! each module of this crate is one step of that sentence and imports only from the steps before it.

pub mod config;
pub mod error;
pub mod loader;
pub mod shard;
pub mod state;
pub mod tokens;

pub use config::Config;
pub use error::{Error, ErrorKind, Result};
pub use loader::Loader;
pub use state::State;
