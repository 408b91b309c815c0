//! Token loader for LLM training.
//!
//! Paths become shards, shards a corpus with an index, the corpus a layout of sequences, sequences an order, and the order batches: each
//! module of this crate is one step of that sentence and imports only from the steps before it.
//!
//! ```no_run
//! use std::time::Duration;
//! use forebay::{Config, Loader, loader::Next};
//!
//! let loader = Loader::open(Config { data: vec!["corpus/".into()], batch_size: 8, ..Config::default() })?;
//! let batches = loader.iter();
//! while let Next::Batch(batch) = batches.next_timeout(Duration::MAX)? {
//!     println!("step {}: {:?}", batch.step, batch.row("input_ids", 0));
//! }
//! # Ok::<(), forebay::Error>(())
//! ```

pub mod buffer;
pub mod config;
pub mod corpus;
pub mod coverage;
pub mod environment;
pub mod error;
mod fill;
pub mod index;
pub mod layout;
pub mod ledger;
pub mod loader;
mod nearest;
pub mod opened;
pub mod order;
mod pipeline;
mod placement;
pub mod plan;
mod read;
pub mod recipe;
pub mod settings;
pub mod shard;
mod sources;
pub mod state;
pub mod stats;
mod sync;
pub mod tokens;
mod trace;

pub use config::Config;
pub use error::{Error, ErrorKind, Result};
pub use loader::{Batch, Batches, Loader, Next};
pub use state::State;
