//! Token loader for LLM training.
//!
//! Each module below is one step on the way of the data, and imports only from the steps before it:
//!
//! ```text
//! text error notices sync keys tokens -> settings -> storage -> format -> corpus -> layout
//!   -> order -> fill -> observe -> read -> buffer -> pipeline -> proof -> loader -> batch_source
//! ```
//!
//! ```no_run
//! use std::time::Duration;
//! use forebay::{Config, Loader, loader::Next};
//!
//! let config = Config { data: vec!["corpus/".into()], batch_size: 8, ..Config::default() };
//! let loader = Loader::open(config)?;
//! let batches = loader.iter();
//! while let Next::Batch(batch) = batches.next_timeout(Duration::MAX)? {
//!     println!("step {}: {:?}", batch.step, batch.row("input_ids", 0));
//! }
//! # Ok::<(), forebay::Error>(())
//! ```

pub mod batch_source;
pub mod buffer;
pub mod corpus;
pub mod error;
mod fill;
pub mod format;
mod keys;
pub mod layout;
pub mod loader;
pub mod notices;
pub mod observe;
pub mod order;
mod pipeline;
pub mod proof;
mod read;
pub mod settings;
pub mod storage;
mod sync;
pub mod text;
pub mod tokens;

pub use error::{Error, ErrorKind, Result};
pub use loader::state::State;
pub use loader::{Batch, Batches, Loader, Next};
pub use settings::Config;
