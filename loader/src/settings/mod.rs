//! Settings: the table that defines them, and the sources that their values come from.
//!
//! `table` defines each setting once. [`Config`] holds their values. [`resolve`] finds the values
//! in arguments, the environment and the configuration file, and decides the rank and the number of
//! threads. [`Framework`] holds what a training framework says beside them. [`mixture`] is the
//! syntax of one setting: several corpora with weights.

mod config;
pub mod environment;
mod forms;
mod framework;
pub mod mixture;
mod ranks;
mod reference;
mod resolve;
mod setting;
mod sources;
pub(crate) mod suggest;
mod table;
mod values;

pub use config::{
    Balance, BatchFormat, Config, DataFormat, Epochs, Io, LayoutKind, OnError, Overflow, PackedBy, Phase, Remainder,
    Shuffle, Skip, Split, Targets,
};
pub use framework::{Framework, MeshDimension, ProcessGroup, Sampler};
pub use ranks::{MOST_DEFAULT_THREADS, available_cpus, default_threads};
pub use reference::markdown;
pub use resolve::{Origin, Resolved, Scope, resolve, resolve_within};
pub use setting::{Compared, Setting, SettingKind, Taker};
pub use suggest::nearest_of;
pub(crate) use values::{MOST_CPUS, cpus_text, skips_text};
pub use values::{Value, list_text, size};

/// Every setting, in the order of the table.
pub fn all() -> &'static [Setting] {
    table::SETTINGS
}

/// The setting called `name`.
pub fn find(name: &str) -> Option<&'static Setting> {
    all().iter().find(|setting| setting.name == name)
}

/// The setting that a mistyped `name` most likely means.
pub fn nearest(name: &str) -> Option<&'static str> {
    suggest::nearest_of(name, all().iter().map(|setting| setting.name))
}
