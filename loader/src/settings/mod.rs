//! Settings: their values, their one table, and the places that they are read from.
//!
//! [`Config`] holds the values. The table describes each setting by name, and the environment, the
//! configuration file, the command line and the documentation are made from it. Mixtures of corpora
//! are a setting with a syntax of its own.

pub mod config;
pub mod environment;
pub mod mixture;
pub(crate) mod suggest;
mod table;

pub use config::{Config, DataFormat, Epochs, Io, Remainder, Shuffle, Skip, Split, Targets};
pub use table::{Kind, Setting, all, find, list_text, markdown, nearest, size};
pub(crate) use table::{MOST_CPUS, boolean, cpus_text, integer, skips_text};
